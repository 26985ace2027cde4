"""A model's training curves, the parity of its export, and its card."""

from __future__ import annotations

import streamlit as st

from shell import choose_artifact, show_origin
from tuneloop.evals.overview import describe_parity, read_card, read_json, read_training_log

SMALL_CHARTS = (
    ("learning_rate", "Learning rate"),
    ("grad_norm", "Gradient norm"),
    ("tokens_per_s", "Tokens per second"),
)

_, artifact = choose_artifact("models", "Model")
log = read_training_log(artifact)
if log:
    st.subheader("Training loss")
    st.caption("Mean over the target tokens of each step's batch, in nats.")
    st.line_chart(log, x="step", y="loss", x_label="optimizer step", y_label="loss", height=300)
    shown = [(name, label) for name, label in SMALL_CHARTS if name in log[0]]
    for column, (name, label) in zip(st.columns(len(shown) or 1), shown, strict=False):
        column.markdown(f"**{label}**")
        column.line_chart(log, x="step", y=name, x_label="step", y_label="", height=170)
    with st.expander("All logged values"):
        st.dataframe(log, hide_index=True)
else:
    st.info("This model has no training log.")
parity = read_json(artifact, "parity.json")
if parity is not None:
    st.subheader("Export equals training")
    (st.success if parity.get("passed", True) else st.error)(describe_parity(parity))
    with st.expander("All numbers"):
        st.json(parity, expanded=1)
card = read_card(artifact)
if card:
    st.subheader("Model card")
    with st.container(border=True):
        st.markdown(card)
show_origin(artifact)
