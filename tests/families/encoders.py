"""Encoders, encoder-decoders, vision and audio models of transformers, two layers each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from .rows import VOCABULARY, Row, pixels, tokens

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
PATCHES: dict[str, Any] = {"image_size": 16, "patch_size": 4, "num_channels": 3}
VISION: dict[str, Any] = {
    **PATCHES, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4
}  # fmt: skip
TEXT: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
IMAGE = VOCABULARY - 1  # the token that stands for a patch of an image


def text(batch: int, seed: int) -> dict[str, Any]:
    """Ids and a mask under which the last two tokens of the first row are padding."""
    ids = tokens(batch, seed=seed)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def pair(batch: int, seed: int) -> dict[str, Any]:
    decoder = tokens(batch, 7, seed=seed + 1000)
    return {"input_ids": tokens(batch, seed=seed), "decoder_input_ids": decoder, "use_cache": False}


def image(batch: int, seed: int) -> dict[str, Any]:
    return {"pixel_values": pixels(batch, 3, 16, 16, seed=seed)}


def picture(batch: int, seed: int) -> dict[str, Any]:
    """For models that shrink their input by 32."""
    return {"pixel_values": pixels(batch, 3, 32, 32, seed=seed)}


def both(batch: int, seed: int) -> dict[str, Any]:
    return {**text(batch, seed), **image(batch, seed)}


def speech(batch: int, seed: int) -> dict[str, Any]:
    features = pixels(batch, 16, 40, seed=seed)
    return {"input_features": features, "decoder_input_ids": tokens(batch, 7, seed=seed), "use_cache": False}


def wave(batch: int, seed: int) -> dict[str, Any]:
    return {"input_values": pixels(batch, 400, seed=seed)}


def illustrated(batch: int, seed: int) -> dict[str, Any]:
    """Sixteen image tokens, then words."""
    ids = torch.cat((torch.full((batch, 16), IMAGE), tokens(batch, 6, seed=seed) % IMAGE), 1)
    return {"input_ids": ids, **image(batch, seed), "use_cache": False}


def prefixed(batch: int, seed: int) -> dict[str, Any]:
    """The same with the types that a processor gives; without them, transformers compiled differs from eager."""
    given = illustrated(batch, seed)
    return {**given, "token_type_ids": torch.zeros_like(given["input_ids"])}


def patched(batch: int, seed: int) -> dict[str, Any]:
    """One image of 4 x 4 patches a row, flattened, that a 2 x 2 merger turns into four tokens."""
    ids = torch.cat((torch.full((batch, 4), IMAGE), tokens(batch, 8, seed=seed) % IMAGE), 1)
    grid = torch.tensor([[1, 4, 4]] * batch)
    return {
        "input_ids": ids, "pixel_values": pixels(batch * 16, 3 * 2 * 4 * 4, seed=seed), "image_grid_thw": grid,
        "mm_token_type_ids": (ids == IMAGE).int(), "use_cache": False,
    }  # fmt: skip


def made(model: str, config: str, **options: Any) -> Callable[[], torch.nn.Module]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**options))


def llava() -> torch.nn.Module:
    vision = transformers.CLIPVisionConfig(**VISION)
    words = transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=words, image_token_index=IMAGE, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config)


def paligemma() -> torch.nn.Module:
    vision = transformers.SiglipVisionConfig(**VISION, projection_dim=64, vision_use_head=False)
    words = transformers.GemmaConfig(**TEXT)
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=words, image_token_index=IMAGE, projection_dim=64
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def qwen2_vl() -> torch.nn.Module:
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, image_token_id=IMAGE,
        video_token_id=IMAGE - 1, vision_start_token_id=IMAGE - 2, vision_end_token_id=IMAGE - 3,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config)


def clip() -> torch.nn.Module:
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config={**SIZES, "projection_dim": 32}, vision_config=VISION, projection_dim=32)
    )


def encoder(name: str, traits: str, model: str, config: str, **options: Any) -> Row:
    return Row(name, "encoder", traits, made(model, config, **{**SIZES, **options}), text)


LABELS = {"num_labels": 10}
ENCODERS = [
    encoder("BERT", "post-norm, learned positions, token types", "BertForMaskedLM", "BertConfig"),
    encoder("RoBERTa", "positions from the padding", "RobertaForMaskedLM", "RobertaConfig"),
    Row("DistilBERT", "encoder", "BERT without token types", made(
        "DistilBertForMaskedLM", "DistilBertConfig",
        vocab_size=VOCABULARY, dim=64, hidden_dim=96, n_layers=2, n_heads=4, max_position_embeddings=64), text),
    encoder("ALBERT", "one layer called twice", "AlbertForMaskedLM", "AlbertConfig", embedding_size=32),
    encoder("ELECTRA", "narrow embeddings", "ElectraForMaskedLM", "ElectraConfig", embedding_size=32),
    encoder("DeBERTa V2", "content and relative positions attend apart", "DebertaV2ForMaskedLM", "DebertaV2Config",
            relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, type_vocab_size=0),
    encoder("ModernBERT", "alternating windows, rotary, GEGLU", "ModernBertForMaskedLM", "ModernBertConfig",
            local_attention=6, global_attn_every_n_layers=2),
    encoder("MPNet", "one relative bias for all layers", "MPNetForMaskedLM", "MPNetConfig"),
]  # fmt: skip
PAIRS = [
    Row("T5", "encoder-decoder", "relative biases, unscaled attention, RMSNorm",
        made("T5ForConditionalGeneration", "T5Config", **T5), pair),
    Row("T5 v1.1", "encoder-decoder", "gated GELU", made(
        "T5ForConditionalGeneration", "T5Config",
        **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False), pair),
    Row("BART", "encoder-decoder", "post-norm, cross attention",
        made("BartForConditionalGeneration", "BartConfig", **BART), pair),
    Row("Marian", "encoder-decoder", "sinusoidal positions, a bias on the logits",
        made("MarianMTModel", "MarianConfig", **BART), pair),
    Row("Pegasus", "encoder-decoder", "pre-norm BART",
        made("PegasusForConditionalGeneration", "PegasusConfig", **BART), pair),
    Row("Whisper", "encoder-decoder", "two 1-d convolutions before the encoder",
        made("WhisperForConditionalGeneration", "WhisperConfig", **{
            **BART, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 64}), speech),
]  # fmt: skip
SEEN = [
    Row("ViT", "vision and audio", "patches by a convolution",
        made("ViTForImageClassification", "ViTConfig", **VISION, **LABELS), image),
    Row("DINOv2", "vision and audio", "scaled residuals",
        made("Dinov2ForImageClassification", "Dinov2Config", **VISION, **LABELS), image),
    Row("Swin", "vision and audio", "shifted windows, merged patches", made(
        "SwinForImageClassification", "SwinConfig", **PATCHES, embed_dim=32, depths=[2, 2], num_heads=[2, 4],
        window_size=2, **LABELS), image),
    Row("ResNet", "vision and audio", "convolutions, batch norms", made(
        "ResNetForImageClassification", "ResNetConfig", embedding_size=16, hidden_sizes=[32, 48], depths=[1, 2],
        **LABELS), picture),
    Row("ConvNeXt", "vision and audio", "depthwise convolutions, LayerNorm over channels", made(
        "ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[32, 64], depths=[1, 2], num_stages=2,
        **LABELS), picture),
    Row("MobileNet V2", "vision and audio", "inverted residuals, ReLU6", made(
        "MobileNetV2ForImageClassification", "MobileNetV2Config", depth_multiplier=0.25, image_size=32,
        **LABELS), picture),
    Row("CLIP", "vision and audio", "two towers", clip, both, lambda output: output.logits_per_image),
    Row("Wav2Vec 2", "vision and audio", "strided 1-d convolutions, a weight-normed one", made(
        "Wav2Vec2ForCTC", "Wav2Vec2Config", **{
            **SIZES, "conv_dim": [32, 32], "conv_stride": [5, 2], "conv_kernel": [10, 3],
            "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}), wave),
    Row("LLaVA", "vision-language", "CLIP tower, projector, Llama", llava, illustrated),
    Row("PaliGemma", "vision-language", "SigLIP tower, Gemma with a prefix", paligemma, prefixed),
    Row("Qwen 2 VL", "vision-language", "rotary over three axes, 3-d convolution", qwen2_vl, patched),
]  # fmt: skip
OTHERS = [*ENCODERS, *PAIRS, *SEEN]
