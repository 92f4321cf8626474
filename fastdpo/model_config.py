"""ModelConfig: which model, how it is loaded, and which adapter is trained.

Names and defaults are those of TRL's ModelConfig where the meaning is theirs. What does not stand
here is refused by name (option_names.py). The standard library alone: see options.py.
"""

from dataclasses import dataclass, fields

from .errors import ConfigError
from .option_names import settle
from .options import AUTO, Count, Share, check_fields, checked_init, option

BASE_PRECISIONS = ("auto", "bf16", "8bit", "4bit", "fp8")
ATTENTION_HELP = (
    "varlen_attn, flash_attention_2, _3 or _4, flex_attention, sdpa; by default the first that "
    "gives this model's numbers here, the fastest first."
)
ADAPTER_OPTIONS = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_layers_to_transform",
    "lora_modules_to_save", "use_rslora", "use_dora",
)  # fmt: skip
FOUR_BIT_OPTIONS = ("bnb_4bit_quant_type", "use_bnb_nested_quant")


@checked_init(settle)
@dataclass
class ModelConfig:
    """Which model, how it is loaded, and the adapter that is trained; TRL's ModelConfig."""

    model_name_or_path: str | None = option(None, "A folder or hub name: a model, or an adapter.")
    model_revision: str = option("main", "Branch, tag or commit of a hub model.")
    dtype: str | None = option(
        "float32",
        "Type of the weights in memory; `auto` keeps the saved one.",
        ("auto", "bfloat16", "float16", "float32"),
    )
    trust_remote_code: bool = option(False, "Run the Python code that the model ships with.")
    attn_implementation: str | None = option(None, ATTENTION_HELP)
    use_peft: bool = option(False, "Train a LoRA adapter instead of the whole model.")
    lora_r: Count = option(16, "Rank of the adapter.")
    lora_alpha: Count = option(32, "Scale of the adapter: alpha / r.")
    lora_dropout: Share = option(0.05, "Dropout inside the adapter, while disable_dropout is off.")
    lora_target_modules: list[str] | None = option(
        None, "Modules that get an adapter, by the end of their names; by default all-linear."
    )
    lora_layers_to_transform: list[float] | None = option(
        None, "Numbers of the layers that get an adapter; by default all."
    )
    lora_modules_to_save: list[str] | None = option(
        None, "Modules trained in full beside the adapter, and saved with it."
    )
    use_rslora: bool = option(False, "Rank-stabilised scale: alpha / sqrt(r).")
    use_dora: bool = option(False, "Weight-decomposed LoRA.")
    load_in_8bit: bool = option(False, "Hold the frozen base in 8 bits (bitsandbytes).")
    load_in_4bit: bool = option(False, "Hold the frozen base in 4 bits (bitsandbytes): QLoRA.")
    base_precision: str | None = option(
        None,
        "bf16, 8bit, 4bit: dtype or load_in_8bit/4bit in one word. fp8: bf16, then the linear "
        "layers in 8-bit floats (Hopper or newer; emulated on a CPU), and the log says by how much "
        "log-probs move. auto: the first of the first three that the plan finds room for. none: as "
        "those options say.",
        BASE_PRECISIONS,
    )
    bnb_4bit_quant_type: str = option("nf4", "Format of the 4 bits.", ("fp4", "nf4"))
    use_bnb_nested_quant: bool = option(False, "Quantize the 4-bit constants as well.")
    ref_model_name_or_path: str | None = option(
        None, "A folder or hub name: a reference other than the policy as it starts."
    )
    ref_model_revision: str | None = option(
        None,
        "Branch, tag or commit of that reference; by default model_revision where it is the same "
        "repository, else main.",
    )
    ref_load_in_4bit: bool = option(False, "Hold that reference in 4 bits (bitsandbytes).")

    def __post_init__(self) -> None:
        check_fields(self, ModelConfig)
        self._settle_precision()
        if self.load_in_8bit and self.load_in_4bit:
            raise ConfigError("'load_in_8bit' and 'load_in_4bit' exclude each other; keep one")
        for name in ("ref_load_in_4bit", "ref_model_revision"):
            if getattr(self, name) and self.ref_model_name_or_path is None:
                raise ConfigError(f"{name!r} needs a reference model: ref_model_name_or_path")
        defaults = {field.name: field.default for field in fields(ModelConfig)}
        for names, needs in (
            (ADAPTER_OPTIONS, ("use_peft",)),
            (FOUR_BIT_OPTIONS, ("load_in_4bit", "ref_load_in_4bit")),
        ):
            given = [name for name in names if getattr(self, name) != defaults[name]]
            if given and not any(getattr(self, switch) for switch in needs):
                raise ConfigError(
                    f"{given[0]!r} has no effect without {needs[0]!r}; add {needs[0]}: true "
                    f"(--{needs[0]}), or leave {', '.join(given)} out"
                )
        for name in ("load_in_8bit", "load_in_4bit"):
            if getattr(self, name) and not self.use_peft:
                raise ConfigError(
                    f"{name!r} holds frozen weights, which only an adapter can train; "
                    "add use_peft: true (--use_peft)"
                )

    @property
    def reference_revision(self) -> str:
        """The revision that the named reference is loaded at."""
        if self.ref_model_revision is not None:
            return self.ref_model_revision
        is_same = self.ref_model_name_or_path == self.model_name_or_path
        return self.model_revision if is_same else "main"

    def _settle_precision(self) -> None:
        """`base_precision` in terms of `dtype`, `load_in_8bit` and `load_in_4bit`."""
        if self.base_precision is None:
            return
        if not self.use_peft:
            raise ConfigError(
                "'base_precision' is that of frozen weights, which only an adapter can train; add "
                "use_peft: true (--use_peft), or set dtype"
            )
        bits = {"8bit": self.load_in_8bit, "4bit": self.load_in_4bit}
        if other := [f"load_in_{b}" for b, on in bits.items() if on and b != self.base_precision]:
            raise ConfigError(
                f"'base_precision' {self.base_precision!r} and {other[0]!r} contradict each other; "
                "keep one"
            )
        if self.base_precision != AUTO:
            self.take_precision(self.base_precision)

    def take_precision(self, precision: str) -> None:
        """Sets the options that `precision`, "bf16", "8bit", "4bit" or "fp8", stands for."""
        self.base_precision, self.dtype = precision, "bfloat16"
        self.load_in_8bit, self.load_in_4bit = precision == "8bit", precision == "4bit"
