"""The style sheet of the pages that `html` makes: two colour schemes, and narrow screens."""

STYLE = """
:root{color-scheme:light dark;--text:#1b1f24;--soft:#59636e;--line:#d1d9e0;--back:#fff;
--s0:#0072b2;--s1:#d55e00;--s2:#009e73;--s3:#b5578f;--s4:#a87400;--s5:#3f8fc0}
@media(prefers-color-scheme:dark){:root{--text:#e6edf3;--soft:#9198a1;--line:#3d444d;--back:#0d1117;
--s0:#56b4e9;--s1:#ff8c42;--s2:#2cc79a;--s3:#e49bc4;--s4:#e6b422;--s5:#8fc7ff}}
body{max-width:76rem;margin:2rem auto;padding:0 1rem;background:var(--back);color:var(--text);
font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}.sentence{font-size:1.1rem;font-weight:600}
table{border-collapse:collapse;margin:.8rem 0;width:100%}caption{text-align:left;color:var(--soft)}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;
overflow-wrap:break-word}th{color:var(--soft);font-weight:600}.bad{color:var(--s1);font-weight:600}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
p,table,figure{max-width:60rem}.wide table{max-width:none}.wide{overflow-x:auto}
.wide .note{white-space:nowrap}@media(max-width:40rem){.wide table{min-width:38rem}}
.wide tr>:first-child{position:sticky;left:0;background:var(--back)}
.facts{width:auto}.facts th{min-width:6rem}.facts td{white-space:pre-line}
.bars td:nth-child(3){width:60%}.bars td{border:0}.bars tr:not(.under) td{border-top:1px solid var(--line)}
.bars .under td{padding-top:0;width:auto}.bar{height:.8rem;background:var(--s0);min-width:1px}
.bar.out{background:var(--s1)}.bar.before{height:.4rem;margin-top:1px;background:var(--soft)}
.plot{position:relative;padding:.25rem 0;min-height:.8rem}
.plot .limit{position:absolute;top:0;bottom:0;border-left:2px dashed var(--s1)}
li{margin:.3rem 0;max-width:60rem}summary{cursor:pointer;color:var(--soft)}
@media(max-width:40rem){.stack thead{display:none}.stack tr{display:block;padding:.4rem 0;
border-bottom:1px solid var(--line)}
.stack td{display:inline-block;border:0;padding:.1rem .9rem .1rem 0;text-align:left;white-space:normal}
.stack td::before{content:attr(data-label) " ";color:var(--soft)}.stack td:empty{display:none}}
.marks td:last-child{width:58%}.note{color:var(--soft);font-size:.85rem}
.forest{position:relative;height:1.1rem;margin-top:.25rem}.forest i{position:absolute;top:0;bottom:0}
.forest .zero{border-left:1px solid var(--soft)}.forest .range{top:.5rem;bottom:auto;height:2px;background:var(--s0)}
.forest .point{top:.3rem;width:.5rem;height:.5rem;margin-left:-.25rem;border-radius:50%;background:var(--s0)}
.forest .limit{border-left:2px dashed var(--s1)}.scale{display:flex;justify-content:space-between}
svg{width:100%;height:auto}svg text{fill:var(--soft);font:12px system-ui,sans-serif}.grid{stroke:var(--line)}
.key{margin-right:1.2rem;white-space:nowrap}.key i{display:inline-block;width:1.4rem;border-top:3px solid}
"""
