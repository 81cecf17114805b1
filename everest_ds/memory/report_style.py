"""The report's style sheet: light and dark by the reader's setting, readable in print, no fonts to fetch."""

# Colours of the stacked parts, light and dark; the pairs differ in lightness too, for readers who don't see hues.
PARTS: dict[str, tuple[str, str]] = {
    "parameters": ("#1f4e79", "#5b9bd5"),
    "optimizer states": ("#4a8ac4", "#2f6ca3"),
    "gradients": ("#9fc5e8", "#a9cdf0"),
    "communication buffers": ("#6b5b95", "#8f7fc0"),
    "encoder activations": ("#0f7a5a", "#2fb58a"),
    "decoder activations": ("#5fbf8f", "#1d7f5f"),
    "inputs and temporaries": ("#d9a441", "#e3b65c"),
    "outside tensors": ("#8a8f98", "#7d838d"),
}


def style(classes: dict[str, str]) -> str:
    """The style sheet; ``classes`` maps a part of memory to its class."""
    light = "".join(f"--{classes[part]}:{colours[0]};" for part, colours in PARTS.items())
    dark = "".join(f"--{classes[part]}:{colours[1]};" for part, colours in PARTS.items())
    fills = "".join(f".{name}{{fill:var(--{name});background:var(--{name})}}" for name in classes.values())
    return (
        f":root{{color-scheme:light dark;{_LIGHT}{light}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{_DARK}{dark}}}}}{_RULES}{fills}"
    )


_LIGHT = (
    "--page:#ffffff;--panel:#f6f7f9;--ink:#1c2430;--soft:#5a6472;--rule:#d9dee5;"
    "--everest:#0b7285;--videomae:#b8500c;--bad:#b3261e;--bad-page:#fdeceb;"
)
_DARK = (
    "--page:#14181f;--panel:#1c222c;--ink:#e6eaf0;--soft:#a3adba;--rule:#333c49;"
    "--everest:#4fc3d9;--videomae:#f2a15f;--bad:#ff8a80;--bad-page:#3a2022;"
)
_RULES = """
*{box-sizing:border-box}
body{margin:0 auto;max-width:1320px;padding:2rem 1.25rem 4rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .25rem}h2{font-size:1.25rem;margin:2.5rem 0 .5rem}
h3{font-size:1rem;margin:.25rem 0}p{max-width:75ch}.soft{color:var(--soft)}a{color:var(--everest)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;margin:1rem 0}dt{color:var(--soft)}dd{margin:0}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:1rem}
figure{margin:0;padding:1rem;background:var(--panel);border:1px solid var(--rule);border-radius:10px}
svg{display:block;width:100%;height:auto;font:12px system-ui,"DejaVu Sans",sans-serif}
.scroll{overflow-x:auto;border:1px solid var(--rule);border-radius:10px;margin:1rem 0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.75rem .8rem;color:var(--soft);font-size:.9rem}
th,td{padding:.4rem .8rem;border-top:1px solid var(--rule);text-align:left;white-space:nowrap}
thead th{background:var(--panel);font-weight:600}.number{text-align:right}
tbody th{font-weight:400}td small{color:var(--soft);display:inline-block;min-width:2.6em}
tr.first>*{border-top:2px solid var(--soft)}
td.oom{background:var(--bad-page);color:var(--bad)}td.oom small{color:inherit}td.oom b{font-weight:700}
details{margin:.6rem 0;border:1px solid var(--rule);border-radius:10px;padding:.6rem 1rem;background:var(--panel)}
summary{cursor:pointer;font-weight:600}summary:focus-visible,a:focus-visible{outline:3px solid var(--everest)}
.legend{display:flex;flex-wrap:wrap;gap:.35rem 1.1rem;padding:0;margin:.75rem 0;list-style:none;font-size:.9rem}
.legend i{display:inline-block;width:.85em;height:.85em;border-radius:3px;margin-right:.45em;vertical-align:-1px}
text{fill:var(--ink)}text.tick,text.axis{fill:var(--soft)}text.limit-name{fill:var(--bad);font-weight:600}
line.grid{stroke:var(--rule);stroke-width:1}line.limit{stroke:var(--bad);stroke-width:1.5;stroke-dasharray:6 4}
.line{fill:none;stroke-width:2}.line.everest,.mark.everest{stroke:var(--everest)}
.line.videomae,.mark.videomae{stroke:var(--videomae)}.mark.everest{fill:var(--everest)}
.mark.videomae{fill:var(--videomae)}.mark.oom{fill:var(--panel);stroke-width:1.5}
text.name.everest{fill:var(--everest)}text.name.videomae{fill:var(--videomae)}
@media print{details{break-inside:avoid}}
"""
