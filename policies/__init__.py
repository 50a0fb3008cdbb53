"""Policies by bare name: one file each, and one line in `POLICIES`.

An entry is ``module:attribute``, options may follow: ``policies.all_far:AllFar:bits=3``. The same
syntax works on the command line, ``--policies all_far:bits=3,balance:hysteresis=0.3`` needs quotes
only where the shell does.
"""

POLICIES: dict[str, str] = {
    "agent": "policies.agent:LayerAgent",
    "all_far": "policies.all_far:AllFar",
    "all_far4": "policies.all_far:AllFar:bits=4",
    "all_far3": "policies.all_far:AllFar:bits=3",
    "all_far2": "policies.all_far:AllFar:bits=2",
    "all_hbm": "policies.all_hbm:AllHbm",
    "all_hbm_mixed": "policies.all_hbm_mixed:AllHbmMixed",
    "balance": "policies.balance:Balance",
    "balance_feedback": "policies.balance_feedback:BalanceFeedback",
    "context_aware": "policies.context_aware:ContextAware",
    "ema": "policies.ema:Ema",
    "expertflow": "policies.expertflow:ExpertFlow",
    "expertflow_cache": "policies.expertflow_cache:OracleExpertFlowCache",
    "fiddler": "policies.fiddler:Fiddler",
    "hindsight_static": "policies.hindsight_static:OracleHindsightStatic",
    "hobbit": "policies.hobbit:Hobbit",
    "kt_dynamic": "policies.ktransformers:KTransformers:placement=dynamic",
    "kt_frequency": "policies.ktransformers:KTransformers:placement=frequency",
    "kt_front": "policies.ktransformers:KTransformers:placement=front",
    "kt_random": "policies.ktransformers:KTransformers:placement=random",
    "kt_uniform": "policies.ktransformers:KTransformers:placement=uniform",
    "lfu": "policies.lfu:Lfu",
    "lru": "policies.lru:Lru",
    "mc_moe": "policies.mc_moe:McMoe",
    "mixtral_offloading": "policies.mixtral_offloading:MixtralOffloading",
    "moe_infinity": "policies.moe_infinity:MoeInfinity",
    "moe_speq": "policies.moe_speq:MoeSpeq",
    "monde": "policies.monde:Monde",
    "monde_seed": "policies.monde:Monde:credit=0.27",
    "oracle_balance": "policies.oracle_balance:OracleBalance",
    "oracle_hot": "policies.oracle_hot:OracleHot",
    "prefill_topk": "policies.prefill_topk:PrefillTopK",
    "random": "policies.random:Random",
    "static_popularity": "policies.static_popularity:StaticPopularity",
    "tuned": "policies.tuned:tuned",
}

SAME_RULES: dict[str, str] = {
    "kt_dynamic": "prefill_topk",
    "kt_frequency": "static_popularity",
    "kt_random": "random",
}
"""Names whose plans are those of another by construction, so that ``all`` leaves them out.

They keep KTransformers' names, and its 8 bit where a system stores that width; the other policy
serves the same with ``:bits=8,far_bits=8``.
"""
