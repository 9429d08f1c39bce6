"""Hypothesis strategies of what modules are made with."""

from hypothesis import strategies as st

#: Fields of `AdaptiveConfig` that change what a gate reads or how it picks.
gate_kinds = st.fixed_dictionaries(
    {
        "query_block_size": st.sampled_from([None, 1, 2, 3, 8]),
        "pooling": st.sampled_from(["mean_max", "mean", "max"]),
        "gate": st.sampled_from(["straight_through", "soft"]),
        "share_across_heads": st.booleans(),
        "window_size": st.sampled_from([None, 6]),
        "row_budget": st.sampled_from(["even", "share"]),
        "learn_density": st.booleans(),
    }
)
