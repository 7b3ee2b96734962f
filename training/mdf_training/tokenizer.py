"""A preset in, the content of its tokenizer.json out."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mdf_sdk.errors import CheckpointError
from mdf_training.backbone import find_smollm2
from mdf_training.config import ModelConfig
from mdf_training.synthetic import corpus


def load_tokenizer(config: ModelConfig) -> str:
    """Return tokenizer.json for a preset; the image token's id is the first past the vocabulary.

    Raises:
        CheckpointError: the preset's tokenizer is not to be had without the user's own files.
    """
    if config.preset == "nano":
        tokenizer = train_tokenizer(config)
    elif config.preset == "smol-135m":
        tokenizer = load_smollm2_tokenizer()
    else:
        raise CheckpointError(
            f"{config.preset}: found no tokenizer, expected that of your own copy of the model. "
            "Pass it to mdf_training.train(..., tokenizer_json=...)."
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
