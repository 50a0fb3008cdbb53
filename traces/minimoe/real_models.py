"""Published routing statistics of real models, quoted beside ours in the card."""

MODELS = ("DeepSeek-V2-Lite (E 64, k 6)", "OLMoE-1B-7B (E 64, k 8)", "Gemma-4-26B (E 128, k 6)")

SOURCE = """\
DeepSeek-V2-Lite and OLMoE: computed from BrianBoitano/nvmoe `dsv2lite-all` and `olmoe-all` (decode
only, 1396 and 897 tokens; their first 29 tokens stand for the prompt). Gemma-4: computed from
Helldez/BigMoeOnEdge `2026-07-15-route-trace`, one request of 29 prompt and 128 decode tokens: too
short for popularity (*). OLMoE by and across domains: aggregate counts of allenai/OLMoE
`scripts/routing_output`, ~205k tokens per domain; OLMoE gates: helloimrizy-pages/opt, renormalised.
"""

# One entry per row of the card, one cell per model.
CELLS: dict[str, tuple[str, str, str]] = {
    "Zipf exponent, pooled": (".34", ".55", "1.01*"),
    "Zipf exponent, per domain": ("-", ".27 to .87", "-"),
    "Zipf exponent, per request": (".54", ".78", "1.01*"),
    "Entropy / ln E, pooled; per request": (".982; .944", ".945; .868", ".745*; .745*"),
    "Share of the hottest 10 %": (".170", ".253", ".596*"),
    "Hottest expert / mean": ("2.4", "4.0", "13.7*"),
    "Coldest expert / mean, worst layer": (".145", ".0", "-"),
    "Reuse at lag 1 (by layer)": (".242 (.13 to .33)", ".418 (.26 to .51)", ".357 (.19 to .50)"),
    "Reuse at lag 2": (".183", ".352", ".293"),
    "Reuse at lag 4": (".156", ".321", ".284"),
    "Reuse at lag 8": (".154", ".337", ".261"),
    "Reuse at lag 16": (".147", ".311", ".237"),
    "Reuse at lag 64": (".150", ".331", ".260"),
    "Reuse by chance, pooled; per request": (".109; .143", ".192; .310", "-; .252"),
    "Lag 1 above chance per request": (".100", ".108", ".105"),
    "Coverage of 16 tokens (shuffled)": (".648 (.697)", ".587 (.647)", ".270 (.302)"),
    "Coverage of 32 tokens (shuffled)": (".816 (.865)", ".710 (.783)", ".368 (.389)"),
    "Coverage of 64 tokens (shuffled)": (".926 (.950)", ".809 (.868)", ".450 (.472)"),
    "Domains alike: cosine; Spearman": ("-", ".63; .09", "-"),
    "Requests alike: cosine; Spearman": (".69; .11", ".44; .05", "-"),
    "Prompt and answer: cosine; Spearman": (".75; .33", ".82; .53", ".72; .54"),
    "- prompt of one domain": ("-", "-", "-"),
    "- mixed prompt": ("-", "-", "-"),
    "First 64 decoded and rest: cosine; Spearman": (".90; .64", ".93; .76", ".92; .80"),
    "Next layer, recall@k (popularity only)": (".473 (.164)", ".603 (.302)", "-"),
    "Looped decode steps": ("0", ".02", "0"),
    "Mean gate by rank": (
        "-",
        ".225 .170 .141 .120 .102 .089 .080 .072",
        ".312 .200 .153 .127 .110 .098",
    ),
}
