"""Every parameter of the released checkpoints has its place, with its shape, in both directions."""

import json
from dataclasses import replace
from functools import cache

import pytest
from reference import FIXTURES, MINI_SD1, MINI_SD2, load_manifest

from controlnet.config import ControlConfig
from controlnet.layouts import control_map, control_values, diffusers_control_map
from controlnet.model import ControlNet
from ldm.checkpoints.diffusers import text_values, unet_values, vae_values
from ldm.checkpoints.key_maps import Source, base_maps, text_map, unet_map, vae_map
from ldm.checkpoints.load import IGNORED, wanted_shapes, without_weights
from ldm.config import SD15, SD21, UNetConfig
from ldm.text_encoder import TextEncoder
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

MINI_SD1_WIDE = replace(MINI_SD1, unet=replace(MINI_SD1.unet, channels=64))
FAMILIES = {
    "ldm_sd15": SD15,
    "ldm_sd21": SD21,
    "mini_sd1": MINI_SD1,
    "mini_sd1wide": MINI_SD1_WIDE,
    "mini_sd2": MINI_SD2,
}


@cache
def base_parts(config):
    with without_weights():
        return [
            (UNet(config.unet), unet_map(config.unet)),
            (AutoencoderKL(config.vae), vae_map(config.vae)),
            (TextEncoder(config.text), text_map(config.text)),
        ]


@cache
def control_parts(config):
    with without_weights():
        return [(ControlNet.from_unet(UNet(config.unet)), control_map(config.unet, ControlConfig()))]


COMPONENTS = ("unet", "vae", "text_encoder", "controlnet")
PUBLISHED = {"sd15": SD15, "sd21": SD21}


@cache
def diffusers_parts(config):
    """By component; in files of one component the keys have no prefix."""
    modules = [module for module, _ in base_parts(config) + control_parts(config)]
    maps = (*base_maps(config, "diffusers"), diffusers_control_map(config.unet, ControlConfig()))
    return dict(zip(COMPONENTS, zip(modules, maps, strict=True), strict=True))


def without_component(keys, component):
    return {key.removeprefix(f"{component}."): value for key, value in keys.items()}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_base_keys_and_shapes_are_those_of_the_released_files(name):
    manifest = load_manifest(f"{name}_checkpoint")
    buffers = IGNORED & manifest.keys()
    assert len(buffers) == (12 if "sd2" in name else 13)  # SD 1.x has position_ids too
    assert wanted_shapes(base_parts(FAMILIES[name])) == {k: v for k, v in manifest.items() if k not in buffers}


@pytest.mark.parametrize("name", FAMILIES)
def test_control_keys_and_shapes_are_those_of_the_released_files(name):
    manifest = load_manifest(f"{name.replace('ldm_', 'ldm_control_')}_control_only")
    assert wanted_shapes(control_parts(FAMILIES[name])) == manifest


@pytest.mark.parametrize("version", PUBLISHED)
@pytest.mark.parametrize("component", COMPONENTS)
def test_diffusers_keys_and_shapes_are_those_of_the_published_files(version, component):
    found = wanted_shapes([diffusers_parts(PUBLISHED[version])[component]])
    assert without_component(found, component) == load_manifest(f"diffusers_{version}_{component}")


@pytest.mark.parametrize("version", PUBLISHED)
@pytest.mark.parametrize("component", COMPONENTS)
def test_both_layouts_agree_on_where_a_parameter_stands(version, component):
    """As diffusers' own conversion has it, rows of fused tensors and convolutions as matrices included."""
    config = PUBLISHED[version]
    name = f"{version}_text_encoder" if component == "text_encoder" else component
    published = dict(leaves(json.loads((FIXTURES / "manifests" / f"map_{name}.json").read_text())))
    module, key_map = diffusers_parts(config)[component]
    ldm = dict(zip(COMPONENTS, [key_map for _, key_map in base_parts(config) + control_parts(config)], strict=True))
    theirs, originals = key_map.sources(module.state_dict()), ldm[component].sources(module.state_dict())
    found = {source.key: described(originals[name], source.matrix) for name, source in theirs.items()}
    assert without_component(found, component) == published


def leaves(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def described(original, matrix):
    if original.rows is not None:
        return f"{original.key} rows[{original.rows[0]}:{original.rows[1]}]"
    return f"{original.key} reshape" if matrix else original.key


@pytest.mark.parametrize("version", PUBLISHED)
def test_configurations_for_diffusers_are_the_published_ones(version):
    config = PUBLISHED[version]
    ours = {
        "unet": unet_values(config),
        "vae": vae_values(config),
        "text_encoder": text_values(config.text),
        "controlnet": control_values(config.unet, ControlConfig()),
    }
    for component, values in ours.items():
        published = json.loads((FIXTURES / "manifests" / f"diffusers_{version}_{component}.config.json").read_text())
        # Sizes of pictures are hints for the user alone.
        for key in published.keys() - {"_class", "sample_size"}:
            assert values[key] == published[key], (component, key)


# Written down from the numbering rules of the original code: it counts every module that a block has, in order.
SHALLOW = UNetConfig(8, (1, 2, 4), 1, (True, True, True), (1, 1, 1), context_width=8, groups=4)
SHALLOW_KEYS = {
    "encoder.blocks.0.conv.bias": "input_blocks.0.0.bias",
    "encoder.blocks.1.transformer.block.norm3.bias": "input_blocks.1.1.transformer_blocks.0.norm3.bias",
    "encoder.blocks.2.conv.conv.bias": "input_blocks.2.0.op.bias",
    "encoder.blocks.5.res.norm1.bias": "input_blocks.5.0.in_layers.0.bias",
    "decoder.blocks.1.upsample.conv.bias": "output_blocks.1.2.conv.bias",
    "decoder.blocks.3.upsample.conv.bias": "output_blocks.3.2.conv.bias",
    "decoder.blocks.5.transformer.norm.bias": "output_blocks.5.1.norm.bias",
}


@pytest.mark.parametrize("unet, upsampler", [(SHALLOW, 2), (replace(SHALLOW, attention=(True, True, False)), 1)])
def test_other_depths_follow_the_same_numbering(unet, upsampler):
    with without_weights():
        names = [name for name, _ in UNet(unet).named_parameters()]
    sources = unet_map(unet).sources(names)
    for name, key in SHALLOW_KEYS.items():
        if name.startswith("decoder.blocks.1."):
            key = f"output_blocks.1.{upsampler}.conv.bias"
        assert sources[name] == Source("model.diffusion_model." + key)
    assert len({source.key for source in sources.values()}) == len(names)


def test_a_parameter_without_a_row_is_an_error():
    with pytest.raises(KeyError):
        unet_map(UNetConfig()).sources(["encoder.blocks.12.res.norm1.weight"])


def test_parameter_counts_are_the_published_ones():
    published = {
        SD15: (859_520_964, 83_653_863, 123_060_480, 361_279_120),
        SD21: (865_910_724, 83_653_863, 354_032_641, 364_228_240),
    }
    for config, counts in published.items():
        parts = base_parts(config) + control_parts(config)
        assert tuple(count(module) for module, _ in parts) == counts
        control = parts[-1][0]
        assert count(control.hint_encoder) == 1_086_480
        assert count(control.zero_convs) == 9_840_000
        assert count(control.middle_zero_conv) == 1_639_680
    assert sum(published[SD15][:3]) == 1_066_235_307
    assert sum(published[SD21][:3]) == 1_303_597_228
