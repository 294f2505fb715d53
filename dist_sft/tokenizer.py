"""Load the tokenizer that belongs to a recipe, with the control tokens that its template adds."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dist_sft.chat import Template, add_new_tokens, load_template
from dist_sft.config import Model
from dist_sft.errors import UserError
from dist_sft.generate_recipe import GenerateModel
from dist_sft.paths import explain_missing, model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Words(NamedTuple):
    """What turns rows into tokens."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    new_tokens: int
    """Control tokens that the template added to the vocabulary."""


def load_words(model: Model | GenerateModel, template: str, key: str = "data.template") -> Words:
    """Load tokenizer and template; `key` is the latter's place in the recipe.

    Raises UserError where there is no tokenizer, no EOS token, or no such template.
    """
    from transformers import AutoTokenizer

    place = model.tokenizer or model_folder(model.path or "")
    where = "model.tokenizer" if model.tokenizer else "model.path"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            place,
            revision=None if model.tokenizer else model.revision,
            trust_remote_code=model.trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{where}: no tokenizer at {place}: {explain_missing(place, error)}\n"
            "Give a folder with tokenizer.json, or a hub name; model.tokenizer says where it is if "
            "not beside the model."
        ) from error
    loaded = load_template(template, tokenizer, key)
    return Words(tokenizer, loaded, add_new_tokens(tokenizer, loaded))


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many embeddings the tokenizer needs; its ids may have gaps."""
    return 1 + max(int(number) for number in tokenizer.get_vocab().values())
