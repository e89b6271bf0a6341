"""The Step1X-Edit text encoder on the host's Qwen2.5-VL (docs/model.md, Prompt; Language model; v1.2 conditioning)."""

from dataclasses import asdict

import comfy.model_management
import torch
from comfy import sd1_clip
from comfy.text_encoders.qwen_image import Qwen25_7BVLITokenizer

from ...checkpoints.language_model import MLLMConfig
from ...errors import Step1XError
from ...images import BLACK_PICTURE, picture_grid, to_thinker_size
from ...network.positions import text_ids
from ...prompts.chat import chat, untemplated
from ...prompts.cut import KEPT, layout_states, say_cut
from ...prompts.image_memory import ImageMemory
from ...prompts.layouts import SEQUENCES
from ...prompts.v12 import SPECIAL_TOKENS
from ...reasoning.token_sampling import Sampling
from ...versions import LAYOUT_V11
from .qwen import Qwen25VL
from .writing import STOP_IDS

TEXT_ENCODER_NAME = "qwen25_7b"


def resizing_device() -> torch.device | None:
    """Return the GPU that resizes images, the one on which the host runs text encoders, or None for the CPU."""
    device = comfy.model_management.text_encoder_device()
    return device if device.type == "cuda" else None


class Step1XTextModel(sd1_clip.SDClipModel):
    def __init__(self, config: MLLMConfig, device="cpu", dtype=None, model_options={}):
        super().__init__(
            device=device,
            layer="last",
            textmodel_json_config=asdict(config),
            dtype=dtype,
            special_tokens={"pad": 151643},
            layer_norm_hidden_state=False,
            model_class=Qwen25VL,
            model_options=model_options,
        )

    def forward(self, tokens):
        """Encode one list of ids that contains one image, as Step1XTokenizer makes it; returns states [1, L, C] and no
        pooled output.

        For the layout of v1.2, returns only the kept states, and a dict with what else the transformer needs:
        "text_ids" [1, L, 3], "text_embeds" [1, L, C], "text_mask" [1, L].
        """
        device = self.execution_device
        if device is None:
            device = self.transformer.get_input_embeddings().weight.device
        sequence = tokens[0]
        at = next(i for i, token in enumerate(sequence) if isinstance(token, dict))
        picture = sequence[at]
        if "text_mask" not in picture:
            return self.transformer.encode(sequence, device, hide_zeros=True)[0], None
        states, embeds, positions = self.transformer.encode(sequence, device, hide_zeros=False)
        grid = picture_grid(picture["data"])
        mask = [*picture["text_mask"][:at], *[0] * (grid[0] * grid[1]), *picture["text_mask"][at + 1:]]
        # The official code passes both in bfloat16, whatever dtype the models use.
        states, embeds = (tensor[:, KEPT].bfloat16().float() for tensor in (states, embeds))
        return (
            states,
            None,
            {
                "text_ids": text_ids(positions, at, grid, picture["working_size"])[None],
                "text_embeds": embeds,
                "text_mask": torch.tensor([mask])[:, KEPT],
            },
        )

    def check_can_generate(self) -> None:
        """Raise Step1XError for weights without a language-model head."""
        if not self.transformer.can_generate:
            raise Step1XError(
                "This text encoder cannot generate text: its file has no language-model head (lm_head.weight). Load "
                "the full Qwen2.5-VL-7B-Instruct, or for v1.2 the text_encoder folder of the Step1X-Edit v1.2 "
                "repository."
            )

    def generate(
        self,
        tokens,
        do_sample,
        max_length,
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        seed,
        presence_penalty=0.0,
    ):
        """Generate the reply to one prompt in the host's token structure; returns its ids. The settings are those of
        Hugging Face's `generate`.

        Without sampling, or with temperature 0, the most probable token is always taken. For several prompts, generated
        as one batch, `temperature` and `seed` are lists with one entry for each, and so is the result.
        Raises Step1XError for weights without a language-model head, and for a repetition penalty of 0.
        """
        self.check_can_generate()
        together = isinstance(seed, list)
        rows = zip(temperature, seed) if together else [(temperature, seed)]
        samplings = [
            Sampling(
                temperature=heat if do_sample else 0,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                presence_penalty=presence_penalty,
                seed=number or 0,
            )
            for heat, number in rows
        ]
        sequences = [[token[0] for token in sequence] for sequence in tokens[TEXT_ENCODER_NAME]]
        replies = self.transformer.generate(sequences[:len(samplings)], self.execution_device, max_length, samplings)
        return replies if together else replies[0]


class Step1XTEModel(sd1_clip.SD1ClipModel):
    """Encodes one prompt to [1, 640, C] with its attention mask [1, 640], or for v1.2 to [1, L, C] with the extras of
    `Step1XTextModel.forward`."""

    def __init__(
        self,
        config: MLLMConfig,
        device="cpu",
        dtype=None,
        model_options={},
        dtype_llama=None,
        llama_quantization_metadata=None,
    ):
        if llama_quantization_metadata is not None:
            model_options = {**model_options, "quantization_metadata": llama_quantization_metadata}

        super().__init__(
            device=device,
            dtype=dtype_llama or dtype,
            name=TEXT_ENCODER_NAME,
            clip_model=Step1XTextModel,
            model_options=model_options,
            config=config,
        )

    def encode_token_weights(self, token_weight_pairs):
        states, pooled, *extra = super().encode_token_weights(token_weight_pairs)
        if extra:
            return states, pooled, {name: tensor.to(states.device) for name, tensor in extra[0].items()}
        cond, mask = layout_states(states)
        return cond, pooled, {"attention_mask": mask}

    def memory_estimation_function(self, tokens, device=None) -> int:
        """Return the bytes that a run over these tokens needs besides the weights; the host asks before it loads
        them."""
        model = getattr(self, self.clip).transformer
        sequences = [[token[0] for token in sequence] for sequence in tokens.get(TEXT_ENCODER_NAME, [])]
        return model.working_memory(sequences) if sequences else 0


class Step1XTokenizer(sd1_clip.SD1Tokenizer):
    """The host's tokenizer with Step1X-Edit's prompt layouts. layout: how prompts are laid out."""

    def __init__(self, embedding_directory=None, tokenizer_data={}, layout=LAYOUT_V11):
        super().__init__(
            embedding_directory=embedding_directory,
            tokenizer_data=tokenizer_data,
            name=TEXT_ENCODER_NAME,
            tokenizer=Qwen25_7BVLITokenizer,
        )
        self.layout = layout
        # The host's tokenizer has four tags of later models, which are plain text to Qwen2.5-VL.
        inner = getattr(self, self.clip)
        known = {
            id: token for id, token in inner.tokenizer.added_tokens_decoder.items() if str(token) in SPECIAL_TOKENS
        }
        inner.tokenizer = type(inner.tokenizer).from_pretrained(
            inner.tokenizer.name_or_path, added_tokens_decoder=known
        )

    def token_ids(self, text: str) -> list[int]:
        return getattr(self, self.clip).tokenizer(text)["input_ids"]

    def tokenize_chat(self, texts: list[str], pictures: list, memory: ImageMemory | None = None) -> dict:
        """Tokenise texts around images [H, W, C] (see chat.py) to the host's token structure for generation.

        memory: keeps what is made of the images, for further questions about them.
        """
        memory = ImageMemory() if memory is None else memory
        sequence, device = self.token_ids(texts[0]), resizing_device()
        for picture, text in zip(pictures, texts[1:]):
            pixels = memory.once(picture, to_thinker_size, lambda picture: to_thinker_size(picture, device))
            sequence += [{"type": "image", "data": pixels, "memory": memory}, *self.token_ids(text)]
        return {TEXT_ENCODER_NAME: [[(token, 1.0) for token in sequence or [STOP_IDS[0]]]]}

    def tokenize_request(self, text, skip_template, image=None, video=None, audio=None) -> dict:
        """Tokenise a request of the host's 'Generate Text' node: a text, and the images of a batch [B, H, W, C] before
        it.

        Raises Step1XError for video and audio.
        """
        if video is not None or audio is not None:
            raise Step1XError(
                "The text encoder of Step1X-Edit reads images, not video or audio. Connect the frames to the image "
                "input."
            )
        pictures = [] if image is None else list(image)
        return self.tokenize_chat(*(untemplated(text, pictures) if skip_template else chat(None, [*pictures, text])))

    def decode(self, token_ids, skip_special_tokens=True):
        # The model has more ids than its tokenizer, and some tokenizers fail on those.
        known = len(getattr(self, self.clip).tokenizer)
        return super().decode([token for token in token_ids if token < known], skip_special_tokens=skip_special_tokens)

    def tokenize_with_weights(self, text, return_word_ids=False, images=[], size_level=1024, memory=None, **kwargs):
        """Tokenise a prompt and at most one image [B, H, W, C] (its first entry) to the host's token structure.

        For v1.0 and v1.1 the image must be at its working size. For v1.2 it is the original, which is edited at
        size_level. memory: an ImageMemory, for further prompts with this image.

        Without an image the model gets a black one, as in the official text to image. Prompt weights such as (word:1.2)
        are not supported; the text is taken literally. The host's 'Generate Text' node, which alone passes
        `skip_template`, gets its text laid out as a chat instead.
        """
        if "skip_template" in kwargs:
            return self.tokenize_request(
                text, kwargs["skip_template"], kwargs.get("image"), kwargs.get("video"), kwargs.get("audio")
            )
        if len(images) > 1:
            raise Step1XError(
                f"Step1X-Edit reads one image with the prompt, but {len(images)} are connected. Connect a single image."
            )
        picture = images[0][0] if len(images) > 0 else torch.zeros(BLACK_PICTURE, BLACK_PICTURE, 3)
        memory = ImageMemory() if memory is None else memory
        sequence = SEQUENCES[self.layout](text, picture, size_level, self.token_ids, memory, resizing_device())
        say_cut(text, sequence.cut, sequence.cut_picture)
        return {
            TEXT_ENCODER_NAME: [[(token, 1.0, 0) if return_word_ids else (token, 1.0) for token in sequence.tokens]]
        }
