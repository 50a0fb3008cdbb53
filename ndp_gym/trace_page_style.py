"""Colours and layout of the page about a recording; dark where the reader's system is dark."""

STYLE = """
:root{--bg:#fbfbfa;--card:#fff;--text:#1d2125;--soft:#59626c;--rule:#dfe3e7;
--c0:#1f62b5;--c1:#b8480c;--c2:#69727c;--mark:#a3123a;--faint:#c9d0d7;
--h0:#f3f1ec;--h1:#e1ebf5;--h2:#c3d9ee;--h3:#99c0e2;--h4:#669fd0;--h5:#3a7bb9;--h6:#1d5794;
--h7:#0b2f5e}
@media(prefers-color-scheme:dark){:root{--bg:#121518;--card:#1a1e22;--text:#e7e9ec;--soft:#a6afb9;
--rule:#333a42;--c0:#6fb2ff;--c1:#ffa066;--c2:#a1aab4;--mark:#ff7d9c;--faint:#3d464f;
--h0:#353b42;--h1:#1a3048;--h2:#1c456b;--h3:#235d92;--h4:#3179b8;--h5:#559cda;--h6:#8fc2f0;
--h7:#d6ebff}}
*{box-sizing:border-box}
body{margin:0 auto;padding:24px;max-width:1400px;background:var(--bg);color:var(--text);
font:15px/1.5 system-ui,"Segoe UI",Roboto,Helvetica,Arial,sans-serif}
h1{font-size:26px;margin:0 0 8px}h2{font-size:18px;margin:0 0 4px}
p{margin:0 0 10px;color:var(--soft)}
.facts{list-style:none;padding:0;margin:0 0 16px;color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;
margin-bottom:16px}
.tiles div,section{background:var(--card);border:1px solid var(--rule);border-radius:8px;
padding:14px 16px}
.tiles b{display:block;font-size:24px}.tiles span{color:var(--soft);font-size:13px}
main{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,520px),1fr));gap:16px}
section{min-width:0;overflow-x:auto}.wide svg{max-width:720px}
svg{display:block;width:100%;height:auto}svg [class^=h]{shape-rendering:crispEdges}
.tick{font-size:12px;fill:var(--soft)}.label{font-size:13px;fill:var(--text)}
.value{font-size:12px;fill:var(--text)}.value.dark{fill:var(--card)}
.grid{stroke:var(--rule)}.axis{stroke:var(--soft);fill:none}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.line.c0{stroke:var(--c0)}
.line.c1{stroke:var(--c1)}.line.c2{stroke:var(--c2)}.line.dashed{stroke-dasharray:6 4}
.dot.c0{fill:var(--c0)}.dot.c1{fill:var(--c1)}.dot.c2{fill:var(--c2)}
.mark{stroke:var(--mark);stroke-width:2}.faint{stroke:var(--faint)}
.cut{stroke:var(--text);fill:none}
.h0{fill:var(--h0);background:var(--h0)}.h1{fill:var(--h1);background:var(--h1)}
.h2{fill:var(--h2);background:var(--h2)}.h3{fill:var(--h3);background:var(--h3)}
.h4{fill:var(--h4);background:var(--h4)}.h5{fill:var(--h5);background:var(--h5)}
.h6{fill:var(--h6);background:var(--h6)}.h7{fill:var(--h7);background:var(--h7)}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;margin:0 0 6px}
.key{white-space:nowrap}.cell{display:inline-block;width:13px;height:13px;margin-right:5px;
vertical-align:-2px;border:1px solid var(--rule)}
.swatch{display:inline-block;width:20px;height:0;border-top:3px solid;margin-right:6px;
vertical-align:4px}.swatch.dashed{border-top-style:dashed}
.swatch.c0{color:var(--c0)}.swatch.c1{color:var(--c1)}.swatch.c2{color:var(--c2)}
.none{font-style:italic}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:left;font-weight:400;padding:3px 20px 3px 0;vertical-align:top;
border-bottom:1px solid var(--rule)}
tbody th{white-space:nowrap}thead th{color:var(--soft)}
"""
