"""The decoder's keep_unedited, with the miniature's VAE on true edits of drawn scenes."""

import comfy.sd
import comfy.utils
import demo_model
import pytest
import torch
from demo_host import to_image
from loop_host import load_pack, node_classes
from PIL import Image

from miniature.scenes import pair_at
from step1x_core.editing.unedited import MATCHED, OFF, ON
from step1x_core.errors import Step1XError
from step1x_core.host.editing.unedited import decode_kept
from step1x_core.host.prompts.encoding import decode_edit
from step1x_core.host.prompts.tiling import AUTO
from step1x_core.images import to_uint8


@pytest.fixture(autouse=True)
def as_the_executor_runs_nodes():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def small_vae():
    path = demo_model.FOLDER / "vae" / demo_model.VAE_FILE
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))


@pytest.fixture(scope="module")
def edit(small_vae):
    """A pair, and its target as the sampler would return it."""
    pair = pair_at(7, 4, "heldout", kind="recolour", language="en")
    with torch.inference_mode():
        return pair, {"samples": small_vae.encode(to_image(pair.target))}


def test_a_local_edit(small_vae, edit):
    pair, latent = edit
    source, region = to_image(pair.source), torch.from_numpy(pair.region)
    picture, mask, share = decode_kept(small_vae, latent, source, AUTO, ON)
    plain = decode_edit(small_vae, latent, source)
    assert torch.equal(picture[mask == 0], source[mask == 0]) and not mask[0][~region].any()
    assert torch.equal(picture[mask == 1], plain[mask == 1])
    assert 0 < share < region.float().mean() and (mask == 1).sum() > 0.3 * region.sum()
    assert not torch.equal(plain[mask == 0], source[mask == 0]), "without it, the VAE changes what was not edited"


@pytest.mark.once
def test_a_source_of_another_size_and_two_edits_of_it(small_vae, edit):
    pair, latent = edit
    large = to_image(Image.fromarray(pair.source).resize((300, 290), Image.Resampling.BICUBIC))
    both = {"samples": torch.cat([latent["samples"], small_vae.encode(to_image(pair.source))])}
    picture, mask, share = decode_kept(small_vae, both, large, AUTO, MATCHED)
    assert picture.shape == (2, 290, 300, 3) and mask.shape == (2, 290, 300)
    assert 0 < mask[0].mean() < 0.2 and share == pytest.approx(float(mask.mean()))
    assert torch.equal(picture[1], large[0]), "an edit that changed nothing is the source"
    assert torch.equal(picture[0][mask[0] == 0], large[0][mask[0] == 0])


@pytest.mark.once
def test_without_a_source_nothing_is_kept_and_the_log_says_so(small_vae, edit, caplog):
    caplog.set_level("WARNING")
    picture, mask, share = decode_kept(small_vae, edit[1], None, AUTO, ON)
    assert torch.equal(picture, decode_edit(small_vae, edit[1])) and (mask == 1).all() and share == 1
    assert "needs 'source'" in caplog.text


@pytest.mark.once
def test_sources_that_do_not_belong_to_the_edits_are_refused(small_vae, edit):
    with pytest.raises(Step1XError, match="'source' has 2 images, but 1 edits"):
        decode_kept(small_vae, edit[1], to_image(edit[0].source).repeat(2, 1, 1, 1), AUTO, ON)


def test_the_nodes_outputs_by_the_switch(small_vae, edit):
    node = node_classes(load_pack())["Step1XEditDecode"]
    source = to_image(edit[0].source)
    picture, mask, share = node.execute(edit[1], small_vae, source).result
    assert torch.equal(picture, decode_edit(small_vae, edit[1], source)) and (mask == 1).all() and share == 1
    kept = node.execute(edit[1], small_vae, source, keep_unedited=ON).result
    assert kept[2] < 0.2 and (to_uint8(kept[0][0]) != to_uint8(picture[0])).any()
    with pytest.raises(Exception, match="Input 'keep_unedited'"):
        node.execute(edit[1], small_vae, source, keep_unedited="yes")
    assert OFF == next(entry for entry in node.define_schema().inputs if entry.id == "keep_unedited").default
