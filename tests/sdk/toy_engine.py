"""A toy engine: the five graphs with their true bindings, tiny, built in a tenth of a second."""

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mdf_sdk.integrity import digest
from mdf_sdk.manifest import (
    EMBEDDINGS_NAME,
    GOLDEN_NAME,
    MANIFEST_NAME,
    PLANS_NAME,
    TOKENIZER_NAME,
    BlockSpec,
    ImageSpec,
    Manifest,
    PlanSpec,
    PromptSpec,
    QuantizationSpec,
    TensorSpec,
    load_manifest,
    save_manifest,
)
from mdf_sdk.prompt import PromptEncoder

TOWER_PX, UNET_PX, WIDTH, VISION_TOKENS = 16, 32, 8, 4
LAYERS = (1, 3)
LABELS = ("Acquired", "Inherited")
ACTIVATION_BYTES = 100_000  # of each block: more than any needs
MASK_KINDS = ("vessel", "lesion", "disc")
SPECIAL_TOKENS = ("<|begin_of_text|>", "<|image|>", "<|eot_id|>")
PROMPT = PromptSpec(
    prefix="<|begin_of_text|>Classify.",
    suffix=" Answer:",
    image_token="<|image|>",
    end_token="<|eot_id|>",
    max_text_tokens=64,
)

_ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}
_SKIPS = tuple(
    TensorSpec(f"skip_{i}", "float32", ("batch", 3, UNET_PX >> i + 1, UNET_PX >> i + 1))
    for i in range(4)
)
_STATES = TensorSpec("vision_states", "float32", ("batch", VISION_TOKENS, WIDTH))
_CROSS = tuple(
    TensorSpec(f"cross_{kind}_{layer}", "float32", ("batch", VISION_TOKENS, WIDTH))
    for kind in ("key", "value")
    for layer in LAYERS
)
_BOTTLENECK = TensorSpec("bottleneck", "float32", ("batch", 3, 1, 1))
_POOLED = TensorSpec("pooled", "float32", ("batch", 4, WIDTH))
_BINDINGS = {
    "vision": (
        (TensorSpec("tower_pixels", "float32", ("batch", 3, TOWER_PX, TOWER_PX)),),
        (_STATES,),
    ),
    "unet_encoder": (
        (TensorSpec("unet_pixels", "float32", ("batch", 3, UNET_PX, UNET_PX)),),
        (*_SKIPS, _BOTTLENECK),
    ),
    "fusion": ((_STATES, *_SKIPS), _CROSS),
    "decoder": (
        (
            TensorSpec("inputs_embeds", "float32", ("batch", "tokens", WIDTH)),
            TensorSpec("position_ids", "int64", ("batch", "tokens")),
            TensorSpec("attention_mask", "bool", ("batch", 1, "tokens", "columns")),
            TensorSpec("body_mask", "float32", ("batch", "tokens")),
            *_CROSS,
        ),
        (TensorSpec("scores", "float32", ("batch", len(LABELS))), _POOLED),
    ),
    "unet_decoder": (
        (*_SKIPS, _BOTTLENECK, _POOLED),
        (TensorSpec("mask", "float32", ("batch", len(MASK_KINDS), UNET_PX, UNET_PX)),),
    ),
}


def build_toy_engine(engine_dir: Path, *, score_bias: float = 0.0) -> Manifest:
    """Write the engine; deterministic. A `score_bias` of NaN makes its scores NaN."""
    engine_dir.mkdir()
    for block, nodes in _nodes(score_bias).items():
        onnx.save(_graph(block, *nodes), engine_dir / f"{block}.onnx")
    tokenizer_json = _tokenizer().to_str()
    (engine_dir / TOKENIZER_NAME).write_text(tokenizer_json, encoding="utf-8")
    rows = _random(7, 256 + len(SPECIAL_TOKENS), WIDTH).astype(np.float16)
    np.save(engine_dir / EMBEDDINGS_NAME, rows)
    np.savez(engine_dir / GOLDEN_NAME, **_golden(engine_dir, tokenizer_json, rows))
    manifest = Manifest(
        model="toy",
        precision="fp32",
        notice="A toy, not for clinical use.",
        labels=LABELS,
        mask_kinds=MASK_KINDS,
        temperature=1.5,
        image=ImageSpec(TOWER_PX, UNET_PX, (0.5,) * 3, (0.25,) * 3, (0.4,) * 3, (0.2,) * 3),
        prompt=PROMPT,
        quantization=QuantizationSpec("none", 0, "", {}),
        blocks={
            block: BlockSpec(f"{block}.onnx", "fp32", inputs, outputs, ACTIVATION_BYTES)
            for block, (inputs, outputs) in _BINDINGS.items()
        },
        plans=(),
        files={},
        checkpoint="0" * 64,
        built_with={"mdf-mllm": "0.1.0"},
    )
    return seal(engine_dir, manifest)


def seal(engine_dir: Path, manifest: Manifest) -> Manifest:
    """Write the manifest anew, with the digests of the files as they are now."""
    paths = [p for p in sorted(engine_dir.iterdir()) if p.name != MANIFEST_NAME]
    manifest = dataclasses.replace(manifest, files={path.name: digest(path) for path in paths})
    save_manifest(manifest, engine_dir)
    return manifest


def make_plan(engine_dir: Path) -> PlanSpec:
    """Write the file of a plan of the vision block; the manifest does not list it."""
    spec = load_manifest(engine_dir).blocks["vision"]
    (engine_dir / PLANS_NAME).mkdir()
    (engine_dir / PLANS_NAME / "vision.plan").write_bytes(b"plan")
    return PlanSpec(
        block="vision",
        file=f"{PLANS_NAME}/vision.plan",
        builder="tensorrt_rtx 1.7",
        compute_capabilities=("8.9", "12.0"),
        inputs=spec.inputs,
        outputs=spec.outputs,
        profile={"batch": (1, 1, 8)},
        build_s=1.5,
    )


def add_plan(engine_dir: Path) -> None:
    """Make a plan and list it in the manifest."""
    manifest, plan = load_manifest(engine_dir), make_plan(engine_dir)
    files = manifest.files | {plan.file: digest(engine_dir / plan.file)}
    save_manifest(dataclasses.replace(manifest, plans=(plan,), files=files), engine_dir)


def _random(seed: int, *shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _nodes(
    score_bias: float,
) -> dict[str, tuple[list[onnx.NodeProto], dict[str, npt.NDArray[np.generic]]]]:
    """By block: its nodes, and its constants by name."""
    node = helper.make_node
    pool = TOWER_PX // 2
    return {
        "vision": (
            [
                node(
                    "AveragePool",
                    ["tower_pixels"],
                    ["a"],
                    kernel_shape=[pool] * 2,
                    strides=[pool] * 2,
                ),
                node("Reshape", ["a", "shape"], ["b"]),
                node("Transpose", ["b"], ["c"], perm=[0, 2, 1]),
                node("MatMul", ["c", "w"], ["vision_states"]),
            ],
            {"shape": np.array([0, 3, VISION_TOKENS]), "w": _random(0, 3, WIDTH)},
        ),
        "unet_encoder": (
            [
                node("AveragePool", ["unet_pixels"], [out], kernel_shape=[k] * 2, strides=[k] * 2)
                for out, k in zip(
                    [*(skip.name for skip in _SKIPS), "bottleneck"], (2, 4, 8, 16, 32), strict=True
                )
            ],
            {},
        ),
        "fusion": (
            [
                *(
                    node("ReduceMean", [skip.name, "space"], [f"m{i}"], keepdims=0)
                    for i, skip in enumerate(_SKIPS)
                ),
                node("Sum", ["m0", "m1", "m2", "m3"], ["s"]),
                node("Unsqueeze", ["s", "one"], ["u"]),
                node("MatMul", ["u", "w"], ["f"]),
                node("Add", ["vision_states", "f"], ["x"]),
                *(node("Mul", ["x", f"g{i}"], [spec.name]) for i, spec in enumerate(_CROSS)),
            ],
            {
                "space": np.array([2, 3]),
                "one": np.array([1]),
                "w": _random(1, 3, WIDTH),
                **{f"g{i}": _random(10 + i, WIDTH) for i in range(len(_CROSS))},
            },
        ),
        "decoder": (
            [
                node("Unsqueeze", ["body_mask", "last"], ["m"]),
                node("Mul", ["inputs_embeds", "m"], ["e"]),
                node("ReduceSum", ["e", "tokens"], ["t"], keepdims=0),
                node("ReduceSum", ["m", "tokens"], ["n"], keepdims=0),
                node("Div", ["t", "n"], ["body"]),  # (B, D)
                node("Sum", [spec.name for spec in _CROSS], ["x"]),
                node("ReduceMean", ["x", "tokens"], ["image"], keepdims=0),  # (B, D)
                node("Concat", ["body", "image"], ["both"], axis=1),
                node("Gemm", ["both", "w", "b"], ["logits"]),
                node("LogSoftmax", ["logits"], ["scores"]),
                node("Unsqueeze", ["image", "tokens"], ["i"]),
                node("Concat", ["i"] * 4, ["pooled"], axis=1),
            ],
            {
                "last": np.array([2]),
                "tokens": np.array([1]),
                "w": 0.2 * _random(2, 2 * WIDTH, len(LABELS)),
                "b": np.array([0, score_bias], np.float32),
            },
        ),
        "unet_decoder": (
            [
                node("ConvTranspose", ["skip_0", "w"], ["c"], kernel_shape=[2, 2], strides=[2, 2]),
                node("ReduceMean", ["pooled", "rest"], ["p"], keepdims=0),
                node("Reshape", ["p", "shape"], ["q"]),
                node("Sum", ["c", "q"], ["s"]),
                node("Sigmoid", ["s"], ["mask"]),
            ],
            {
                "w": _random(3, 3, len(MASK_KINDS), 2, 2),
                "rest": np.array([1, 2]),
                "shape": np.array([-1, 1, 1, 1]),
            },
        ),
    }


def _graph(
    block: str, nodes: list[onnx.NodeProto], constants: dict[str, npt.NDArray[np.generic]]
) -> onnx.ModelProto:
    inputs, outputs = (
        [helper.make_tensor_value_info(s.name, _ONNX_TYPES[s.dtype], s.shape) for s in specs]
        for specs in _BINDINGS[block]
    )
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, block, inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def _tokenizer() -> Tokenizer:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _golden(
    engine_dir: Path, tokenizer_json: str, rows: npt.NDArray[np.float16]
) -> dict[str, npt.NDArray[np.generic]]:
    encoder = PromptEncoder(tokenizer_json, PROMPT, LABELS)
    golden: dict[str, npt.NDArray[np.generic]] = {}
    for case, text in enumerate(("58 years old", "night blindness since childhood")):
        packed = encoder.pack([encoder.encode(text)])
        prefix = packed.prefix_length
        tensors: dict[str, npt.NDArray[np.generic]] = {
            "tower_pixels": _random(20 + case, 1, 3, TOWER_PX, TOWER_PX),
            "unet_pixels": _random(30 + case, 1, 3, UNET_PX, UNET_PX),
            "inputs_embeds": rows[packed.input_ids[:, prefix:]].astype(np.float32),
            "position_ids": packed.position_ids[:, prefix:],
            "attention_mask": packed.attention_mask[:, None, prefix:],
            "body_mask": packed.body_mask[:, prefix:].astype(np.float32),
        }
        for block, (inputs, outputs) in _BINDINGS.items():
            session = onnxruntime.InferenceSession(engine_dir / f"{block}.onnx")
            values = session.run(
                [spec.name for spec in outputs], {spec.name: tensors[spec.name] for spec in inputs}
            )
            tensors |= zip((spec.name for spec in outputs), values, strict=True)
        golden |= {f"case{case}/{name}": values for name, values in tensors.items()}
    return golden
