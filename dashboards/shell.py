"""What every page begins with: the workspace, the selected artifact, and error messages."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence

import streamlit as st

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.errors import UserError
from tuneloop.evals.reporting.overview import newest_comparison
from tuneloop.evals.scoring.results import Evaluation

# What is chosen on a page of one artifact: what all pages begin with, and what each page says.
_ANEW = {"page": 1, "wrong": None, "error": None, "column": None, "by": None, "unscored": False}
_PAGE_SAYS = ("before", "after", "metric", "task", "pair", "arm", "other", "with")
_CHOSEN = (*_ANEW, *_PAGE_SAYS, "value", "part")
# What else a page can be asked for, whichever artifact it shows.
_ASKED = ("q", "find", "outcome", "tag", "change", "sort", "against", "view", "rows")
_MAKERS = {
    "datasets": ("dataset", "tuneloop prepare CONFIG.yaml"),
    "models": ("model", "tuneloop train CONFIG.yaml"),
    "evaluations": ("evaluation", "tuneloop evaluate CONFIG.yaml"),
    "sweeps": ("sweep", "tuneloop sweep CONFIG.yaml"),
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workspace", default=os.environ.get("TUNELOOP_WORKSPACE", "workspace"))
    parser.add_argument("--read-only", action="store_true")
    return parser.parse_known_args(sys.argv[1:])[0]


def workspace_location() -> str:
    """Return the workspace from `--workspace`, else TUNELOOP_WORKSPACE, else `workspace`."""
    return str(_arguments().workspace)


def is_read_only() -> bool:
    """Return whether votes, marks and test rows are shown and not taken: `--read-only`."""
    return bool(_arguments().read_only)


def sign_in() -> None:
    """End the page for who has not signed in, where Streamlit's own sign-in is configured.

    That is `[auth]` in Streamlit's secrets (OpenID Connect), with one provider or several by name.
    """
    if st.user.get("is_logged_in", True):
        return
    st.title("tuneloop")
    st.write("Sign in to see this workspace. Votes and marks are stored under your name.")
    settings = st.secrets["auth"]
    named = [name for name in settings if isinstance(settings[name], Mapping)]
    for name in named or [None]:
        st.button(
            f"Sign in with {name}" if name else "Sign in",
            type="primary",
            on_click=st.login,
            args=(name,),
        )
    st.stop()


def signed_in_name() -> str:
    """Return under which name somebody has signed in; empty where no sign-in is configured."""
    if not st.user.get("is_logged_in"):
        return ""
    claims = ("email", "preferred_username", "name", "sub")
    return next((str(st.user[claim]) for claim in claims if st.user.get(claim)), "")


def reviewer_name() -> str:
    """Return who judges: who has signed in, else the name given on a page; empty before that."""
    return signed_in_name() or str(st.session_state.get("judge", ""))


def open_workspace() -> tuple[Workspace, list[Artifact]]:
    """Return the workspace and what it holds; without either, say so and end the page."""
    try:
        workspace = Workspace(workspace_location())
        artifacts, damaged = workspace.listing()
    except UserError as error:
        refuse("This workspace cannot be opened.", error)
    for problem in damaged:
        st.warning(f"{problem.what}: `{problem.where}`; {problem.remedy}")
    if not artifacts:
        _show_empty(workspace)
    return workspace, artifacts


def choose_artifact(kind: str, label: str) -> tuple[Workspace, Artifact]:
    """Return the artifact that the page's selector or its address names.

    At first that is the newest; of evaluations the newest that compares arms, of datasets the
    newest that can be trained on.
    """
    workspace, artifacts = open_workspace()
    references = [a.ref for a in reversed(artifacts) if a.kind == kind]
    if not references:
        name, command = _MAKERS[kind]
        st.info(f"No {name} yet. Make one, then come back:")
        st.code(command, language=None)
        st.stop()
    # In the address whichever it is: a link shows the same artifact when there is a newer one.
    asked = st.query_params.get(kind) or st.query_params.get("artifact")
    if asked and asked not in references:
        st.error(f"This workspace has no such {_MAKERS[kind][0]}.")
        st.code(asked, language=None, wrap_lines=True)
        if st.button("Show the newest"):
            st.query_params.clear()
            st.rerun()
        st.stop()
    best = newest_comparison(artifacts) if kind == "evaluations" else None
    if kind == "datasets":
        of_kind = (a for a in reversed(artifacts) if a.kind == kind)
        best = next((a for a in of_kind if is_prepared(a)), None)
    first = asked or (best.ref if best else references[0])
    reference = st.selectbox(label, references, references.index(first), key=kind) or first
    # What was chosen of another artifact does not hold for this one. Where it is chosen on the
    # page, to forget that is not enough: the browser goes on showing and sending it.
    st.session_state.anew = bool(asked) and asked != reference
    if st.session_state.anew:
        for key in _ANEW.keys() & set(st.session_state):
            st.session_state[key] = _ANEW[key]
    elif st.session_state.get(f"shown {kind}", reference) != reference:
        for key in _CHOSEN:
            st.session_state.pop(key, None)
    st.session_state[f"shown {kind}"] = reference
    st.query_params.pop("artifact", None)
    st.query_params[kind] = reference
    try:
        return workspace, workspace.open(reference)
    except UserError as error:
        refuse("This artifact cannot be opened.", error)
        raise


def is_prepared(dataset: Artifact) -> bool:
    """Return whether a dataset has rows to train on: rows that were only scored have none."""
    return (dataset.path / "train").is_dir()


def begin_with(key: str, value: object) -> None:
    """Set what a widget begins with, if another artifact has just been chosen on its page."""
    if st.session_state.anew:
        st.session_state[key] = value


def arrive(page: str) -> None:
    """Forget, where a link leads to a page, what was chosen there before: the link says it all.

    Streamlit keeps what stands in addresses for the next visit to a page.
    """
    if st.session_state.get("at") != page and st.query_params:
        for key in (*_CHOSEN, *_ASKED):
            st.session_state.pop(key, None)
    st.session_state.at = page


def page_number(*chosen: object) -> int:
    """Return the page that the pagination below, or at first the address, asks for.

    Args:
        chosen: What says which rows there are, and their order. Others begin with their first page.
    """
    if "page" in st.session_state and st.session_state.get("page of", chosen) != chosen:
        st.session_state.page = 1
    st.session_state["page of"] = chosen
    asked = st.session_state.get("page") or st.query_params.get("page", "1")
    return int(asked) if str(asked).isdecimal() else 1


def choose_page(num_items: int, page_size: int) -> int:
    """Show the pagination, if there is more than one page, and return the page to show."""
    num_pages = max(1, math.ceil(num_items / page_size))
    return st.pagination(num_pages, key="page", bind="query-params") if num_pages > 1 else 1


def identity(artifact: Artifact) -> str:
    """Return what caches know an artifact by: removed and made again, it has the same place."""
    return f"{artifact.location} {artifact.fingerprint} {artifact.manifest['created_at']}"


def load_evaluation(artifact: Artifact) -> Evaluation:
    """Return an evaluation, cached: published artifacts do not change."""
    return _load(identity(artifact), artifact)


@st.cache_resource(max_entries=4, show_spinner="Reading the evaluation")
def _load(made: str, _artifact: Artifact) -> Evaluation:
    return Evaluation.load(_artifact)


def refuse(title: str, error: Exception) -> None:
    """Show what is wrong and what to do, and end the page."""
    st.error(title)
    st.code(str(error), language=None, wrap_lines=True)
    st.stop()


def show_origin(artifact: Artifact) -> None:
    """Show where an artifact comes from, folded away."""
    manifest = artifact.manifest
    with st.expander("Where it comes from"):
        made_from = ", ".join(f"`{name}`" for name in manifest["inputs"]) or "–"
        st.markdown(f"Made {manifest['created_at']} in `{artifact.location}` from {made_from}.")
        keys = ("fingerprint", "git", "duration_s", "packages", "config", "resources")
        st.json({key: manifest[key] for key in keys}, expanded=1)


def _show_empty(workspace: Workspace) -> None:
    st.subheader("Nothing here yet")
    st.write(f"No artifact has been published in `{workspace.location}`.")
    st.write("Make the first ones with one command, then come back:")
    st.code(
        "make demo\n# or, with your own data\ntuneloop init my.yaml\ntuneloop run my.yaml",
        language=None,
    )
    st.write("If you expected to see something, start the dashboard with another workspace:")
    st.code("tuneloop dashboard --workspace DIRECTORY_OR_URI", language=None)
    st.stop()


def choose_project(artifacts: Sequence[Artifact]) -> str:
    """Return the project chosen on the page; without any the page ends.

    The newest first, and before them those with a model: a sweep, a gate or an export leaves
    evaluations under names of its own.
    """
    names = list(dict.fromkeys(a.name for a in reversed(artifacts) if a.kind == "evaluations"))
    trained = {a.name for a in artifacts if a.kind == "models"}
    names.sort(key=lambda name: name not in trained)
    if not names:
        st.info("No evaluation yet: `tuneloop run CONFIG.yaml` makes one.")
        st.stop()
    return st.selectbox("Project", names, key="project", bind="query-params") or names[0]
