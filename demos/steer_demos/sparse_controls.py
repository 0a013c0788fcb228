"""What a sparse method is measured against: random blocks, and the best blocks there are, at the same density."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from steer.sparse import Prepared, Sparse, Tokens, fitted, ordered, restored
from steer_kernels import block_mass, block_sparse_attention, build, partial
from steer_patches.site import Call, Next, Site


@dataclass(kw_only=True)
class RandomBlocks(Sparse, register=False):
    """Every head of every layer sees its own random key blocks, the same in every step, and the block of the query.

    Args:
        density: computed blocks as a fraction of all.
        seed: of the choice.
    """

    density: float = 0.4
    seed: int = 0

    def make(self, tokens: Tokens, site: Site) -> Prepared:
        assert self.block_size is not None
        block = self.block_size

        def built() -> Prepared:
            blocks = -(-tokens.length // block)
            chance = torch.Generator().manual_seed(1000 * self.seed + site.index)
            scores = torch.rand(1, site.heads, blocks, blocks, generator=chance).to(tokens.device)
            force = build.forced(
                blocks, blocks, diagonal=0, text=tokens.text_span, block_size=block,
                q_len=tokens.length, kv_len=tokens.length, device=tokens.device,
            )  # fmt: skip
            mask = build.top_k(
                scores,
                density=self.density,
                force=force,
                block_size=block,
                q_len=tokens.length,
                kv_len=tokens.length,
            )
            return Prepared(tokens, mask)

        return self.once(site.name, tokens, built)


@dataclass(kw_only=True)
class BestBlocks(Sparse, register=False):
    """Every query block sees the key blocks of the largest attention mass, found by computing all of it.

    Slower than dense attention: it shows what block-sparse attention of this density can reach, not how.

    Args:
        density: computed blocks as a fraction of all.
    """

    density: float = 0.4

    def make(self, tokens: Tokens, site: Site) -> Prepared:
        return self.once("none", tokens, lambda: Prepared(tokens))

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        ready = self.ready(call)
        if ready is None:
            return next(call)
        query, key, value, valid = ordered(call, ready)
        seen = None if valid is None else valid[:, None, None]
        _, lse = partial(query, key, value, mask=seen, scale=call.scale)
        block, length = self.block_size or 128, ready.tokens.length
        mass = block_mass(query, key, lse, block_size=block, scale=call.scale)
        mask = build.top_k(mass, density=self.density, block_size=block, q_len=length, kv_len=length)
        ready.extra = (mask.full_num + mask.partial_num).sum(), mask.full_idx.numel()
        mask = fitted(mask, call, valid)
        return restored(block_sparse_attention(query, key, value, mask, scale=call.scale, backend=self.backend), ready)

    def computed_density(self, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> float | None:
        counts = [site.kernel.extra for site, _ in sites.values() if site.kernel and site.kernel.extra]
        return sum(float(kept) / number for kept, number in counts) / len(counts) if counts else None
