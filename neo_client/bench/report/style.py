"""The report's style sheet: light, and dark where the reader's system is."""

STYLE = """
:root{--back:#fff;--ink:#1c2330;--soft:#5b6472;--line:#e3e6eb;--card:#f6f7f9;
--c0:#2563c9;--c1:#d9730d;--c2:#2a8a5f;--c3:#a23b8f;--c4:#8a6d1b;--c5:#4b5563;
--good:#1d7a4c;--bad:#b42318}
@media(prefers-color-scheme:dark){:root{--back:#12161d;--ink:#e6e9ef;--soft:#9aa4b2;--line:#2a313c;
--card:#1a2029;--c0:#6ea8fe;--c1:#f5a35c;--c2:#5ec99a;--c3:#db8bcb;--c4:#d6b95c;--c5:#a3adba;
--good:#5ec99a;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:24px 20px 60px}
h1{font-size:24px;margin:0 0 12px}h2{font-size:18px;margin:34px 0 10px}
h3{font-size:15px;margin:18px 0 6px}
.run{background:var(--card);border-radius:10px;padding:14px 18px;margin:0 0 12px}
.run p{margin:6px 0}.run ul{margin:6px 0;padding-left:20px}
.when{color:var(--soft);font-size:13px}
.tiles{display:flex;flex-wrap:wrap;gap:10px 34px;margin:4px 0 8px}
.tiles b{display:block;font-size:22px;font-variant-numeric:tabular-nums;line-height:1.25}
.tiles span{color:var(--soft);font-size:13px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(400px,1fr));gap:16px}
figure{margin:0;border:1px solid var(--line);border-radius:10px;padding:10px 12px 4px}
figcaption{font-weight:600;font-size:14px;display:flex;flex-wrap:wrap;gap:4px 14px}
.legend{font-weight:400;color:var(--soft);display:flex;gap:12px;flex-wrap:wrap}
.legend i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px}
svg{width:100%;height:auto;display:block}
svg text{font-size:11px;fill:var(--soft)}
svg .y{text-anchor:end}svg .x{text-anchor:middle}
.grid{stroke:var(--line)}.axis,.tick{stroke:var(--soft)}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.dots{fill:none;stroke-width:3.6;stroke-linecap:round;opacity:.55}
.mark{stroke:var(--bad);stroke-dasharray:4 3}svg .marked{fill:var(--bad)}
.none{color:var(--soft)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:4px 0 12px}
caption{text-align:left;color:var(--soft);padding-bottom:2px}
td,th{padding:3px 14px 3px 0;text-align:right;border-bottom:1px solid var(--line);font-size:14px}
td:first-child,th:first-child,td.text{text-align:left}
th{color:var(--soft);font-weight:500}
.pairs td{vertical-align:top}.text{overflow-wrap:anywhere}
pre{margin:0;white-space:pre-wrap;font-size:12px}
.better{color:var(--good)}.worse{color:var(--bad)}
.unclear,.note{color:var(--soft)}.note{font-size:13px}
details{border-top:1px solid var(--line);padding:8px 0}summary{cursor:pointer;font-weight:600}
@media(max-width:460px){.plots{grid-template-columns:1fr}}
"""
