"""Sentences around a prompt: templates by name or as typed, and their checks."""

from __future__ import annotations

from collections.abc import Sequence

from mome.errors import InputError, did_you_mean

# The sentence of the CLIP-Driven Universal Model (Liu et al. 2023, "CLIP-Driven Universal Model for Organ Segmentation
# and Tumor Detection", arXiv 2301.00785).
TEMPLATE = "A computerized tomography of a {}"

# Templates that a config may name instead of writing them out.
NAMED_TEMPLATES = {"universal_model": TEMPLATE, "prompt_only": "{}"}


def read_templates(template: str, templates: Sequence[str], owner: str) -> tuple[str, ...]:
    """Returns the sentences that a text encoder puts its prompts into.

    Args:
        template: The one template, or its name in `NAMED_TEMPLATES`.
        templates: An ensemble of templates, which replaces `template`; empty where there is none.
        owner: The text encoder, for errors.

    Raises:
        InputError: A template has not exactly one `{}`, stands there twice, or both arguments were given.
    """
    if templates and template != TEMPLATE:
        raise InputError("both template and templates were given", where=owner, hint="templates=[…] alone")
    found = tuple(_sentence(given, owner) for given in (templates or [template]))
    if len(set(found)) != len(found):
        raise InputError("a template stands twice in templates", where=owner, hint="name every template once")
    return found


def _sentence(given: str, owner: str) -> str:
    sentence = NAMED_TEMPLATES.get(given, given)
    if sentence.count("{}") != 1 or sentence.count("{") != 1 or sentence.count("}") != 1:
        raise InputError(
            f"the template has no {{}} for the prompt, or other braces: {given!r:.80}"
            + did_you_mean(given[:80], NAMED_TEMPLATES),
            where=owner,
            hint="'a CT of a {}', or a name: " + ", ".join(NAMED_TEMPLATES),
        )
    return sentence
