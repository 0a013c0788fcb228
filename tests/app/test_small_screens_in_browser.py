"""Every tab on a phone and on a tablet: nothing is cut off, overlaps, or cannot be pressed."""

from __future__ import annotations

from typing import Any

import pytest

from steer_demos.app.page import TABS

pytestmark = pytest.mark.browser

SIZES = {"phone": (375, 800), "tablet": (768, 1024)}
SMALLEST = 22  # pixels: what is pressed is at least that wide and high

# What there is to press and to fill in, with its box; but pictures, on which buttons of their own lie.
CONTROLS = """() => [...document.querySelectorAll('button, input:not([type=file]), textarea, [role=tab]')]
  .filter(each => each.checkVisibility({opacityProperty: true, visibilityProperty: true}) && !each.querySelector('img'))
  .map(each => [each, each.getBoundingClientRect()])
  .filter(([each, box]) => box.width > 1 && box.height > 1)"""
OVERLAPPING = f"""() => {{
  const found = [], controls = ({CONTROLS})();
  const name = each => (each.innerText || each.ariaLabel || each.placeholder || each.type).trim();
  for (const [i, [one, a]] of controls.entries()) for (const [other, b] of controls.slice(i + 1)) {{
    const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    const apart = width <= 2 || height <= 2 || one.contains(other) || other.contains(one);
    if (!apart) found.push(name(one) + " | " + name(other));
  }}
  return found;
}}"""
# What sticks out of the screen, or whose words do not fit into it; what scrolls by itself may be wider inside.
CUT = """() => [...document.querySelectorAll('body *')].filter(each => {
  if (!each.checkVisibility() || each.closest('pre, .cm-editor, table, svg, [aria-hidden=true]')) return false;
  const box = each.getBoundingClientRect();
  if (box.width > 1 && (box.left < -1 || box.right > innerWidth + 1)) return true;
  return each.matches('button, label, h1, h2, h3, p, [role=tab]') && each.scrollWidth > each.clientWidth + 1
    && getComputedStyle(each).display !== 'inline' && getComputedStyle(each).overflowX !== 'visible';
}).map(each => `${each.tagName} ${each.className}: ${each.innerText}`)"""

# Buttons that are too small for a finger, or under something else.
OUT_OF_REACH = """smallest => [...document.querySelectorAll('[role=tabpanel] button')].filter(each => {
  if (!each.checkVisibility({opacityProperty: true, visibilityProperty: true})) return false;
  each.scrollIntoView({block: 'center'});
  const box = each.getBoundingClientRect();
  const there = document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2);
  return Math.min(box.width, box.height) < smallest || !each.contains(there);
}).map(each => each.innerText || each.ariaLabel || each.outerHTML)"""


@pytest.mark.parametrize("tab", TABS)
def test_a_tab_fits_and_can_be_pressed(tab: str, settled: Any) -> None:
    page = settled(tab, *SIZES["phone"])
    for width, height in SIZES.values():
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(CUT) == []
        assert page.evaluate(OVERLAPPING) == []
        assert page.evaluate(OUT_OF_REACH, SMALLEST) == []


def test_the_last_tab_is_found_on_a_phone(settled: Any) -> None:
    from playwright.sync_api import expect

    first, *_, last = TABS
    page = settled(first, *SIZES["phone"])
    page.get_by_role("button", name="More tabs").click()
    page.locator(".overflow-dropdown").get_by_role("button", name=last, exact=True).click()
    expect(page.get_by_role("tab", name=last, exact=True)).to_have_attribute("aria-selected", "true")
