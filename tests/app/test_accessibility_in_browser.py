"""The app without a mouse, and for those who hear it or see it badly: axe-core's rules, the keyboard, focus."""

from __future__ import annotations

from typing import Any

import pytest

from steer_demos.app.page import TABS

pytestmark = pytest.mark.browser

# Faults of Gradio itself: rule -> what its elements are known by.
GRADIOS = {
    "aria-prohibited-attr": 'aria-label="Empty value"',  # the name of a picture that is not there yet
    "color-contrast": '<span class="ͼ',  # code: the page's filter makes its colours clear, which axe-core does not see
}
# Where the focus is: what it is called, and whether it can be seen. Nowhere: between the page's end and its start.
FOCUSED = """() => {
  const each = document.activeElement, style = getComputedStyle(each);
  if (each === document.body) return ["", true];
  const name = each.ariaLabel || each.innerText || each.labels?.[0]?.innerText || each.value || "";
  return [name.trim().split("\\n")[0], style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2];
}"""


def faults(page: Any) -> list[str]:
    """What axe-core finds that keeps somebody out, less what is Gradio's."""
    from axe_playwright_python.sync_playwright import Axe

    return [
        f"{fault['id']}: {node['html'][:200]} ({(node['any'] or node['all'] or node['none'])[0]['message']})"
        for fault in Axe().run(page).response["violations"]
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
        if GRADIOS.get(fault["id"], "\0") not in node["html"]
    ]


def focus_on(page: Any, name: str) -> None:
    """Press Tab until the focus is on what is called so; all of what comes before can be seen to have it."""
    for _ in range(60):
        page.keyboard.press("Tab")
        found, seen = page.evaluate(FOCUSED)
        assert seen, f"no sign of the focus on {found}"
        if found == name:
            return
    raise AssertionError(f"Tab does not lead to {name}")


@pytest.mark.parametrize("tab", TABS)
def test_nothing_in_a_tab_keeps_somebody_out(tab: str, settled: Any) -> None:
    page = settled(tab)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function("dark => document.body.classList.contains('dark') === dark", arg=scheme == "dark")
        assert faults(page) == []


def test_a_picture_is_drawn_without_a_mouse(settled: Any) -> None:
    from playwright.sync_api import expect

    page = settled("Image")
    focus_on(page, "Prompt")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("a tree")
    focus_on(page, "range slider for Steps")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_label("number input for Steps")).to_have_value("2")
    focus_on(page, "Method")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("SE")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="About SEG")).to_be_visible()
    focus_on(page, "Draw")
    page.keyboard.press("Enter")
    page.locator("#image-figures").get_by_text("with SEG").wait_for()
    expect(page.get_by_alt_text("drawn without a method")).to_be_visible()
    assert faults(page) == []


def test_arrows_go_from_tab_to_tab(settled: Any) -> None:
    from playwright.sync_api import expect

    first, second, *_ = TABS
    page = settled(first)
    focus_on(page, first)
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name=second, exact=True)).to_be_focused()
    expect(page.get_by_role("tab", name=second, exact=True)).to_have_attribute("aria-selected", "true")
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("tab", name=first, exact=True)).to_have_attribute("aria-selected", "true")
