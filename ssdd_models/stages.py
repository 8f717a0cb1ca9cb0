"""The stages of SSDD's training and their settings; README.md says what is the paper's and what a default of ours."""

from dataclasses import dataclass, field, replace
from typing import Literal

from ssdd_models.encoder import EncoderConfig
from ssdd_models.layers import Init
from ssdd_models.losses import LossWeights
from ssdd_models.uvit import SIZES, DecoderConfig
from tokbench.data.training_crops import CropConfig
from tokbench.training.optimisation import EmaConfig, OptimConfig, Perceptual, RunConfig

Stage = Literal["joint", "pretrain", "finetune", "distill"]


@dataclass(frozen=True)
class SSDDTraining:
    """Everything that decides a run's result. Raises ValueError for a sampler without steps."""

    stage: Stage = "joint"
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = SIZES["M"]
    init: Init = "normal"  # "fan-in" for widths below 64
    cancel_noise: bool = False  # start from a decoder that takes the noise out of x_t; ours, see train.cancel_noise
    crops: CropConfig = field(default_factory=CropConfig)
    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    weights: LossWeights = field(default_factory=LossWeights)
    perceptual: Perceptual = "lpips-vgg"
    perceptual_start: int = 0  # step from which it counts
    share_at_one: float = 0.0  # of the samples at t = 1 instead of logit-normal; 1: one-step regression
    teacher_steps: int = 7  # of the sample that a distilled student learns
    eval_steps: int = 8  # of the sampler, on held-out images
    gan_start: int = 50_000

    def __post_init__(self) -> None:
        if self.teacher_steps < 1 or self.eval_steps < 1:
            raise ValueError(f"teacher_steps {self.teacher_steps}, eval_steps {self.eval_steps}: must be at least 1")

    @property
    def freeze_encoder(self) -> bool:
        return self.stage != "joint"


EPOCH = 1_281_167 // 256  # steps of 256 images over ImageNet
_JOINT = SSDDTraining(run=RunConfig(steps=300 * EPOCH))
STAGES = {
    "joint": _JOINT,
    "pretrain": replace(_JOINT, stage="pretrain", optim=OptimConfig(learning_rate=3e-4)),
    "finetune": replace(
        _JOINT, stage="finetune", run=RunConfig(steps=200 * EPOCH), crops=CropConfig(256, (256, 256)),
    ),
    "distill": replace(
        _JOINT, stage="distill", run=RunConfig(steps=10 * EPOCH), crops=CropConfig(256, (256, 256)), eval_steps=1,
    ),
}  # fmt: skip

_SMALL = SSDDTraining(
    "pretrain",
    EncoderConfig(width=32, groups=4),
    replace(SIZES["XS"], groups=4),
    "fan-in",
    True,
    CropConfig(64, (192, 320), enlarge=1.1, sample_by="area", flat=8.0, late_size=128, late_share=0.03),
    RunConfig(steps=900, batch_size=16, log_every=20, sample_every=200, save_every=50, eval_every=200),
    OptimConfig("adamw", 1e-3, (0.9, 0.99), clip=1.0, warmup_steps=100, schedule="cosine", final_share=0.05),
    EmaConfig(start_step=0),
    LossWeights(repa=0.0),
    perceptual_start=450,
    share_at_one=0.2,
    eval_steps=1,
)
_SMALL_LAST = replace(
    _SMALL,
    cancel_noise=False,
    crops=replace(_SMALL.crops, late_share=0.06),
    run=replace(_SMALL.run, steps=250),
    optim=replace(_SMALL.optim, learning_rate=3e-4, warmup_steps=20),
    ema=EmaConfig(0.99, 0),
    perceptual_start=0,
    share_at_one=1.0,
)
# The demo weights began so: decoder XS with 4 groups in its norms, 128 photographs, half an hour on two cores. In one
# step, on 14 held-out photographs at 256 px: 24.7 dB and lpips-alex .34 after pretrain, 25.0 and .31 after finetune;
# finetuned again, after 61,520 crops in all, the bundled file has 25.5 and .238 (weights/ssdd.md).
SMALL_STAGES = {
    "joint": replace(_SMALL, stage="joint"),
    "pretrain": _SMALL,
    "finetune": replace(_SMALL_LAST, stage="finetune"),
    "distill": replace(_SMALL_LAST, stage="distill"),
}
PRESETS = {"paper": STAGES, "small": SMALL_STAGES}
