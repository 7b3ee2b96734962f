"""A preset in, the content of its tokenizer.json out."""

import os
import re
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mdf_sdk.errors import CheckpointError
from mdf_training.backbone import find_smollm2
from mdf_training.config import ModelConfig
from mdf_training.data.synthetic import corpus


def load_tokenizer(config: ModelConfig, backbone: str | os.PathLike[str] | None = None) -> str:
    """Return tokenizer.json for a preset; the image token's id is the first past the vocabulary.

    Args:
        backbone: Hugging Face directory to take it from.

    Raises:
        CheckpointError: the preset's tokenizer is not to be had without the user's own files.
    """
    if backbone is not None:
        return read_llama_tokenizer(Path(backbone), config)
    if config.preset == "nano":
        tokenizer = train_tokenizer(config)
    elif config.preset == "smol-135m":
        tokenizer = load_smollm2_tokenizer()
    else:
        raise CheckpointError(
            f"{config.preset}: found no tokenizer, expected that of your own copy of the model. "
            "Pass its directory: --backbone DIR"
        )
    tokenizer.add_special_tokens([AddedToken(config.prompt.image_token, special=True)])
    image_id, expected = tokenizer.token_to_id(config.prompt.image_token), config.text["vocab_size"]
    if image_id != expected:
        raise CheckpointError(
            f"{config.preset}: found the image token at {image_id}, expected {expected}"
        )
    return str(tokenizer.to_str())


def train_tokenizer(config: ModelConfig) -> Tokenizer:
    """Train the nano preset's byte-level BPE on synthetic texts; any other text encodes too."""
    tokenizer = Tokenizer(models.BPE())
    # Digits one by one: an age is then read as tens and units, whatever ages the corpus held.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.text["vocab_size"],
        special_tokens=["<|begin_of_text|>", config.prompt.end_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # As often as common words of the corpus, or the instruction would be spelled letter by letter.
    fixed = [config.prompt.prefix, config.prompt.suffix, *config.labels] * 1000
    tokenizer.train_from_iterator([*fixed, *corpus(5000, 0)], trainer)
    return tokenizer


def load_smollm2_tokenizer() -> Tokenizer:
    """Read SmolLM2's tokenizer out of its GGUF file."""
    from transformers import AutoTokenizer

    path = find_smollm2()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer


def read_llama_tokenizer(folder: Path, config: ModelConfig) -> str:
    """Return the tokenizer.json of a Hugging Face directory, checked against a preset.

    Every special token of the prompt must be one id, the image token the first past the vocabulary,
    and every other id a row of the embedding.

    Raises:
        CheckpointError: no tokenizer there, or not the preset's; names the tokens.
    """
    path = folder / "tokenizer.json"
    try:
        content = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library raises bare Exception
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: {reason}; expected the tokenizer of the model. Copy the directory again."
        ) from None
    prompt, size = config.prompt, config.text["vocab_size"]
    words = prompt.prefix + prompt.suffix + prompt.image_token + prompt.end_token
    problems = []
    for token in dict.fromkeys(re.findall(r"<\|\w+\|>", words)):
        ids = tokenizer.encode(token, add_special_tokens=False).ids
        if len(ids) != 1 or ids[0] != tokenizer.token_to_id(token):
            problems.append(f"no special token {token}")
    image_id = tokenizer.token_to_id(prompt.image_token)
    if image_id not in (None, size):
        problems.append(f"{prompt.image_token} at {image_id}, expected {size}")
    known = sum(token_id < size for token_id in tokenizer.get_vocab().values())
    if known != size:
        problems.append(f"{known} tokens below {size}, expected {size}")
    if problems:
        raise CheckpointError(
            f"{path}: is not the tokenizer of {config.preset}: {'; '.join(problems)}. "
            "Copy the directory again."
        )
    return content
