"""The colours of the dashboard, by what they mean, in its two themes: the style sheet and the charts read them here.

Text on `paper` and on `card` has a contrast of 4.5 or more in both themes, marks of 3 or more (WCAG 2.2 AA). The eight of series are
near those of Okabe and Ito (2008), which people with any colour vision tell apart, each moved in lightness until it stands out. No
colour stands alone: senses have words and shapes, series have names and dashes.
"""

LIGHT: dict[str, str] = {
    "paper": "#fbfbf9", "card": "#ffffff", "ink": "#1c2126", "soft": "#5b646d", "line": "#e3e4df", "faint": "#f2f2ee",
    "before": "#868f98", "after": "#0c7a70", "good": "#0a6b62", "bad": "#b3261e", "warn": "#7d5200", "lost": "#8b1a6b",
    "goodground": "#e6f3f1", "badground": "#fdf1ef", "warnground": "#fbf3df",
    "c1": "#0c7a71", "c2": "#c25100", "c3": "#2069b4", "c4": "#a83f7d", "c5": "#6a51a3", "c6": "#7a6200", "c7": "#4b5563", "c8": "#b3261f",
}  # fmt: skip

DARK: dict[str, str] = {
    "paper": "#101316", "card": "#15191d", "ink": "#e6e8ea", "soft": "#9ba5ae", "line": "#293037", "faint": "#1c2126",
    "before": "#7c8691", "after": "#45c4b5", "good": "#52cfc0", "bad": "#ff9388", "warn": "#e5b55c", "lost": "#f08fd0",
    "goodground": "#12292a", "badground": "#2a1816", "warnground": "#2a2214",
    "c1": "#45c4b6", "c2": "#f0a030", "c3": "#6cb4f0", "c4": "#e79fca", "c5": "#b9a7f2", "c6": "#d8cc5a", "c7": "#c3c9d2", "c8": "#ff8f80",
}  # fmt: skip
"""No two names of a theme have the same value: the page finds a chart's colour by it."""

RAMP: dict[str, tuple[str, ...]] = {
    "light": ("#e9f2f0", "#b0d6cf", "#69b0a7", "#28877d", "#0a4a44"),
    "dark": ("#1e2c2d", "#1f4b4a", "#24726c", "#37a597", "#8ae6d9"),
}
"""From little to much, for scales that interpolate."""

CATEGORIES = ("c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")
THEMES = {"light": LIGHT, "dark": DARK}
