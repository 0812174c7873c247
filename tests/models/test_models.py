"""Networks: as large as published, of the right shapes, and cut anywhere without a change."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dtrp.models import cifar_resnet, get_model, list_models
from dtrp.models.wide_resnet import wide_resnet

# Parameters with 3 input channels and 10 classes; in millions, as published: 0.27, 0.46, 0.66, 0.85, 1.7 and 19.4 for
# the CIFAR ResNets, 11.2 for resnet18 with this stem, 36.5 for wrn28-10, 0.7 for wrn16-2, 9.2 and 14.7 for the VGGs.
COUNTS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "resnet1202": 19_421_274,
    "resnet14-8": 232 + (4 * 576 + 64) + (1152 + 3 * 2304 + 128) + (4608 + 3 * 9216 + 256) + 330,
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "wrn28-10": 36_479_194,
    "wrn16-2": 691_674,
    "vgg11": 9_228_362,
    "vgg16": 14_724_042,
    "vgg11-16": 9 * (3 * 16 + 16 * 32 + 32 * 64 + 64**2 + 64 * 128 + 3 * 128**2)
    + 2 * (16 + 32 + 2 * 64 + 4 * 128)
    + 1290,
    "mlp": (3072 + 1) * 256 + 3 * (256 + 1) * 256 + (256 + 1) * 10,
}
TEXT = ["gpt"]
SMALL = [name for name in COUNTS if name not in ("resnet110", "resnet1202", "wrn28-10")]
CUT = {
    **{name: partial(get_model, name) for name in ("resnet20", "resnet18", "resnet50", "vgg11", "mlp")},
    "wrn10-1": partial(wide_resnet, 10, 1),
}


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def on_meta(*args, **options) -> nn.Sequential:
    with torch.device("meta"):
        return get_model(*args, **options)


def test_every_name_has_a_published_count():
    assert list_models() == [*COUNTS, *TEXT]


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    assert num_parameters(on_meta(name)) == COUNTS[name]


@pytest.mark.parametrize(
    ("name", "count"), [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032)]
)
def test_parameter_count_for_imagenet(name, count):
    assert num_parameters(on_meta(name, num_classes=1000, stem="imagenet")) == count


@pytest.mark.parametrize("name", COUNTS)
def test_a_plain_sequential_of_named_blocks(name):
    model = on_meta(name)
    assert type(model) is nn.Sequential
    names = [block for block, _ in model.named_children()]
    blocks = [block for block in names if block.startswith("block")]
    assert blocks == [f"block{i}" for i in range(1, len(blocks) + 1)]
    first = {"mlp": ["flatten"]}.get(name, [] if name.startswith("vgg") else ["stem"])
    assert names == [*first, *blocks, "head"]
    assert len({id(p) for p in model.parameters()}) == len(list(model.named_parameters(remove_duplicate=False)))


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("resnet20", 9),
        ("resnet1202", 600),
        ("resnet18", 8),
        ("resnet50", 16),
        ("wrn28-10", 12),
        ("wrn16-2", 6),
        ("vgg16", 13),
        ("vgg11-16", 8),
    ],
)
def test_number_of_blocks(name, blocks):
    assert sum(block.startswith("block") for block, _ in on_meta(name).named_children()) == blocks


@pytest.mark.sampled(3)
@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("name", SMALL)
def test_output_shape(name, in_channels):
    model = get_model(name, in_channels, 7)
    assert model(torch.randn(2, in_channels, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet110", "resnet1202", "wrn28-10"])
def test_output_shape_of_the_largest(name):
    assert on_meta(name)(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_imagenet_stem_divides_the_image_by_4(name):
    model = on_meta(name, stem="imagenet")
    assert model[0](torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 64, 56, 56)
    assert model[:-1](torch.empty(1, 3, 224, 224, device="meta")).shape[2:] == (7, 7)
    assert on_meta(name)[:-1](torch.empty(1, 3, 32, 32, device="meta")).shape[2:] == (4, 4)


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "mlp"])
def test_small_images(name):
    model = get_model(name, 1, 10, image_size=8)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    assert get_model("resnet20", 1)(torch.randn(2, 1, 1, 1)).shape == (2, 10)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", SMALL)
def test_float64(name):
    out = get_model(name).double()(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert out.dtype == torch.float64
    assert out.isfinite().all()


@pytest.mark.parametrize("name", CUT)
def test_no_block_writes_its_input(name):
    """In training mode, values and version counter both."""
    model = CUT[name]()
    x = torch.randn(2, 3, 32, 32)
    for block in model:
        before, version = x.clone(), x._version
        out = block(x)
        assert torch.equal(x, before)
        assert x._version == version
        x = out


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CUT)
def test_cut_anywhere(name):
    model = CUT[name]().eval()
    x = torch.randn(2, 3, 32, 32)
    whole = model(x)
    for cut in range(1, len(model)):
        assert torch.equal(model[cut:](model[:cut](x)), whole)


def test_padded_shortcut_is_option_a():
    """Where the residual branch gives 0, a block that halves the image gives every second pixel and zero channels."""
    block = cifar_resnet(8, width=4).eval().block2
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 4, 6, 6)
    out = block(x)
    assert out.shape == (2, 8, 3, 3)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert not out[:, :2].any()
    assert not out[:, 6:].any()


def test_basic_block_from_its_equation(float64):
    block = cifar_resnet(8, width=4).block1
    x = torch.randn(3, 4, 5, 5)

    def norm(t):
        mean, var = t.mean((0, 2, 3), keepdim=True), t.var((0, 2, 3), keepdim=True, correction=0)
        return (t - mean) / (var + 1e-5).sqrt()

    branch = norm(F.conv2d(norm(F.conv2d(x, block.conv1.weight, padding=1)).relu(), block.conv2.weight, padding=1))
    torch.testing.assert_close(block(x), (branch + x).relu(), rtol=1e-12, atol=1e-12)


def test_pre_activation_block_from_its_equation(float64):
    plain, changing = wide_resnet(10, 1)[1:3]
    x = torch.randn(3, 16, 6, 6)

    def norm(t):
        mean, var = t.mean((0, 2, 3), keepdim=True), t.var((0, 2, 3), keepdim=True, correction=0)
        return (t - mean) / (var + 1e-5).sqrt()

    def branch(block, y, stride):
        out = norm(F.conv2d(y, block.conv1.weight, stride=stride, padding=1)).relu()
        return F.conv2d(out, block.conv2.weight, padding=1)

    y = norm(x).relu()
    torch.testing.assert_close(plain(x), x + branch(plain, y, 1), rtol=1e-12, atol=1e-12)
    shortcut = F.conv2d(y, changing.projection.weight, stride=2)
    torch.testing.assert_close(changing(x), shortcut + branch(changing, y, 2), rtol=1e-12, atol=1e-12)


def test_kaiming_init():
    weight = get_model("resnet18").block8.conv2.weight
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


def test_same_seed_same_weights():
    first, second = (torch.manual_seed(1) and get_model("resnet20").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_narrow_cifar_resnet():
    model = cifar_resnet(14, width=8, in_channels=1, num_classes=5)
    assert [name for name, _ in model.named_children()] == ["stem", *(f"block{i}" for i in range(1, 7)), "head"]
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 5)
    assert model.head.linear.in_features == 32


def test_unknown_name():
    with pytest.raises(
        ValueError, match=r"unknown model 'resnet-20'; did you mean 'resnet20'\? known: resnet20, .*mlp"
    ):
        get_model("resnet-20")
    with pytest.raises(ValueError, match=r"unknown model 'xyzzy'; known: resnet20, "):
        get_model("xyzzy")


@pytest.mark.parametrize("name", ["resnet20", "wrn28-10", "vgg11", "mlp"])
def test_imagenet_stem_where_there_is_no_choice(name):
    with pytest.raises(
        ValueError, match=f"stem='imagenet' but {name} has no choice of stem; .* resnet18, resnet34, resnet50"
    ):
        get_model(name, stem="imagenet")


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_unknown_stem(name):
    with pytest.raises(ValueError, match="stem='big': pass one of 'cifar', 'imagenet'"):
        get_model(name, stem="big")


@pytest.mark.parametrize("what", ["in_channels", "num_classes", "image_size"])
@pytest.mark.parametrize("number", [0, -1, 2.0])
def test_numbers_below_1(what, number):
    with pytest.raises(ValueError, match=f"{what}={number}: pass a whole number of at least 1"):
        get_model("mlp", **{what: number})


def test_vgg_refuses_images_that_it_would_halve_to_nothing():
    with pytest.raises(ValueError, match="image_size=8 but vgg16 halves the image 5 times; pass image_size>=32"):
        get_model("vgg16", image_size=8)


@pytest.mark.parametrize(("depth", "nearest"), [(2, "8$"), (7, "8$"), (21, "20 or 26$"), (18, "14 or 20$")])
def test_cifar_depth_is_6n_plus_2(depth, nearest):
    with pytest.raises(
        ValueError, match=rf"depth={depth} but a CIFAR ResNet has 6n \+ 2 layers, n>=1; pass depth={nearest}"
    ):
        cifar_resnet(depth)


def test_cifar_resnet_numbers_below_1():
    with pytest.raises(ValueError, match="width=0: pass a whole number of at least 1"):
        cifar_resnet(20, width=0)
