"""diffusers: rewrite each attention processor class once so that its attention calls pass through a port.

The source of `__call__` is parsed, every `dispatch_attention_fn(...)` and `scaled_dot_product_attention(...)` becomes
a call of the port below, and the result is compiled under the same file name and line numbers into a subclass of the
same name. The processor object, its attributes, signature, weights and backend stay; nothing is patched globally.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import textwrap
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn

from steer_patches.parallel import run_chain_whole
from steer_patches.site import Call, Site, run_chain
from steer_patches.swap import subclass

REPLACEMENTS = {  # of refused processors: what to switch to
    "AttnProcessor": "AttnProcessor2_0",
    "AttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
    "CustomDiffusionAttnProcessor": "CustomDiffusionAttnProcessor2_0",
    "CustomDiffusionXFormersAttnProcessor": "CustomDiffusionAttnProcessor2_0",
    "IPAdapterAttnProcessor": "IPAdapterAttnProcessor2_0",
    "IPAdapterXFormersAttnProcessor": "IPAdapterAttnProcessor2_0",
    "SlicedAttnProcessor": "AttnProcessor2_0 (disable_attention_slicing())",
    "SlicedAttnAddedKVProcessor": "AttnAddedKVProcessor2_0 (disable_attention_slicing())",
    "XFormersAttnProcessor": "AttnProcessor2_0 (disable_xformers_memory_efficient_attention())",
    "XFormersAttnAddedKVProcessor": "AttnAddedKVProcessor2_0 (disable_xformers_memory_efficient_attention())",
    "XFormersJointAttnProcessor": "JointAttnProcessor2_0 (disable_xformers_memory_efficient_attention())",
}


class UnhookableProcessor(TypeError):
    """A processor makes no attention call that a port can replace."""


def _site_of(module: Any) -> Site | None:
    return module.__dict__.get("_steer_site")


class Ports:
    """Mixed into rewritten processor classes. The site lives on the attention module: processors may be shared."""

    _steer_ports: int

    def _steer_dispatch(
        self,
        attn: Any,
        port: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        **extra: Any,
    ) -> torch.Tensor:
        """Stands where `dispatch_attention_fn` stood; tensors are (B, S, H, D)."""
        site = _site_of(attn)
        extra = dict(extra, dropout_p=dropout_p, enable_gqa=enable_gqa, attention_kwargs=attention_kwargs)
        if site is None or not site.chain:
            return dispatch_attention_fn(
                query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, **extra
            )
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        call = Call(q, k, v, attn_mask, scale, is_causal, site, port, extra=extra)
        parallel = getattr(self, "_parallel_config", None)
        if parallel is None or parallel.context_parallel_config is None:
            return run_chain(site.chain, 0, call, _end_dispatch).transpose(1, 2)
        # cross-attention to text that every rank has whole is dispatched without a parallel_config
        split_keys = extra.get("parallel_config") is not None
        config = parallel.context_parallel_config
        return run_chain_whole(call, config, split_keys, _end_dispatch).transpose(1, 2)

    def _steer_sdpa(
        self,
        attn: Any,
        port: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Stands where `F.scaled_dot_product_attention` stood; tensors are (B, H, S, D)."""
        site = _site_of(attn)
        extra = dict(dropout_p=dropout_p, enable_gqa=enable_gqa)
        call = Call(query, key, value, attn_mask, scale, is_causal, site, port, extra=extra)  # type: ignore[arg-type]
        if site is None or not site.chain:
            return _end_sdpa(call)
        return run_chain(site.chain, 0, call, _end_sdpa)


def _end_dispatch(call: Call) -> torch.Tensor:
    q, k, v = call.query.transpose(1, 2), call.key.transpose(1, 2), call.value.transpose(1, 2)
    out = dispatch_attention_fn(q, k, v, attn_mask=call.mask, is_causal=call.is_causal, scale=call.scale, **call.extra)
    return out.transpose(1, 2)


def _end_sdpa(call: Call) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        call.query,
        call.key,
        call.value,
        attn_mask=call.mask,
        is_causal=call.is_causal,
        scale=call.scale,
        **call.extra,
    )


_PORT_OF = {
    "dispatch_attention_fn": "_steer_dispatch",
    "F.scaled_dot_product_attention": "_steer_sdpa",
    "torch.nn.functional.scaled_dot_product_attention": "_steer_sdpa",
}


class _Rewriter(ast.NodeTransformer):
    def __init__(self, processor: str, attn: str) -> None:
        self.processor, self.attn, self.ports = processor, attn, 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        method = _PORT_OF.get(ast.unparse(node.func))
        if method is None:
            return node
        port = ast.Attribute(ast.Name(self.processor, ast.Load()), method, ast.Load())
        ast.copy_location(port, node.func)  # the compiler takes the line of a call from here
        args = [ast.Name(self.attn, ast.Load()), ast.Constant(self.ports), *node.args]
        self.ports += 1
        return ast.copy_location(ast.Call(func=port, args=args, keywords=node.keywords), node)


def _refuse(cls: type, reason: str) -> UnhookableProcessor:
    better = REPLACEMENTS.get(cls.__name__)
    advice = f"; switch to {better} first" if better else "; no drop-in replacement is known"
    return UnhookableProcessor(f"{cls.__name__} {reason}{advice}")


_REWRITTEN: dict[Any, Any] = {}


def steered_class(cls: Any) -> Any:
    """The subclass of processor class `cls` whose attention calls are ports. Raises `UnhookableProcessor`."""
    if issubclass(cls, Ports):
        return cls
    if cls not in _REWRITTEN:
        _REWRITTEN[cls] = _rewrite(cls)
    return _REWRITTEN[cls]


def _rewrite(cls: Any) -> Any:
    function = inspect.unwrap(cls.__call__)
    if not inspect.isfunction(function):
        raise _refuse(cls, "has no Python __call__")
    if function.__closure__:
        raise _refuse(cls, "has a __call__ with a closure, which cannot be rewritten")
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError) as error:
        raise _refuse(cls, f"has no readable source ({error})") from error
    tree = ast.parse(source)
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or len(definition.args.args) < 2:
        raise _refuse(cls, "does not take the attention module as its first argument")
    definition.decorator_list = []
    rewriter = _Rewriter(definition.args.args[0].arg, definition.args.args[1].arg)
    tree = ast.fix_missing_locations(rewriter.visit(tree))
    if rewriter.ports == 0:
        raise _refuse(cls, "makes no attention call that can be hooked (it is eager, sliced, xformers or linear)")
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    flags = function.__code__.co_flags & __future__.annotations.compiler_flag
    namespace: dict[str, Any] = {}
    code = compile(tree, function.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    exec(code, function.__globals__, namespace)
    rewritten = namespace[function.__name__]
    rewritten.__qualname__ = function.__qualname__
    steered = subclass(cls, Ports)
    steered.__call__ = rewritten
    steered._steer_ports = rewriter.ports
    return steered
