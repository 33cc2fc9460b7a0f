"""The text side of the emoji models: tokenizers of the captions, and encoders that are trained with the denoiser."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from ...training import processes

LENGTH = 24
T5_LENGTH = 32
VOCABULARY = 2048
WIDTH = 192
_MARKS = ["<|startoftext|>", "<|endoftext|>"]

Kind = TypeVar("Kind", CLIPTokenizer, T5Tokenizer)


def kept(
    folder: Path, kind: type[Kind], train: Callable[[Sequence[str]], Kind], captions: Sequence[str], start: str = ""
) -> Kind:
    """The tokenizer of a folder; where there is none the first process writes it there.

    Trained twice, the words have other numbers: a run that goes on, and another process, need those of the first time.

    Args:
        folder: of the tokenizer.
        kind: its class.
        train: makes one of the captions.
        captions: to train on.
        start: folder of a trained model whose tokenizer of the same name is taken instead of training one.
    """
    with processes().main_process_first():
        if not folder.is_dir():
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            found = kind.from_pretrained(Path(start) / folder.name) if start else train(captions)
            found.save_pretrained(unfinished)
            unfinished.rename(folder)
    tokenizer: Kind = kind.from_pretrained(folder)
    return tokenizer


def clip_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """A CLIP tokenizer (byte pairs) of the captions' words, `LENGTH` tokens long."""
    trained = Tokenizer(BPE(unk_token=_MARKS[1], end_of_word_suffix="</w>"))
    like_clip = CLIPTokenizer().backend_tokenizer
    trained.normalizer, trained.pre_tokenizer = like_clip.normalizer, like_clip.pre_tokenizer
    trainer = BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=_MARKS, end_of_word_suffix="</w>",
        initial_alphabet=[*map(chr, range(33, 127))], show_progress=False,
    )  # fmt: skip
    trained.train_from_iterator(captions, trainer)
    model = json.loads(trained.to_str())["model"]
    return CLIPTokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], model_max_length=LENGTH
    )


def clip_encoder(tokenizer: CLIPTokenizer, width: int = WIDTH, layers: int = 3) -> CLIPTextModel:
    """An untrained CLIP text encoder for the tokenizer."""
    start, end = tokenizer.convert_tokens_to_ids(_MARKS)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=LENGTH,
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def t5_tokenizer(captions: Sequence[str]) -> T5Tokenizer:
    """A T5 tokenizer (unigrams) of the captions' words, `T5_LENGTH` tokens long."""
    like_t5 = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)], extra_ids=0)
    trained = Tokenizer(Unigram())
    trained.normalizer = like_t5.backend_tokenizer.normalizer
    trained.pre_tokenizer = like_t5.backend_tokenizer.pre_tokenizer
    trainer = UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(captions, trainer)
    pieces = json.loads(trained.to_str())["model"]["vocab"]
    return T5Tokenizer(vocab=[tuple(piece) for piece in pieces], extra_ids=0, model_max_length=T5_LENGTH)


def t5_encoder(tokenizer: T5Tokenizer, width: int = WIDTH, layers: int = 3) -> T5EncoderModel:
    """An untrained T5 encoder for the tokenizer."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=32,
            d_ff=2 * width,
            num_layers=layers,
            num_heads=width // 32,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
