"""Named sets of view parameters against the papers' figures."""

from declip_train.views import AUGMENTATIONS


def test_moco_v2_has_the_papers_numbers():
    views = AUGMENTATIONS["moco_v2"]
    jitter = (views.brightness, views.contrast, views.saturation, views.hue)
    assert jitter == (0.4, 0.4, 0.4, 0.1)
    assert (views.jitter_probability, views.gray_probability) == (0.8, 0.2)
    assert (views.blur_probability, views.blur_sigma_max) == (0.5, 2.0)
    assert (views.crop_scale_min, views.flip_probability) == (0.2, 0.5)


def test_light_views_are_crops_and_nothing_else():
    views = AUGMENTATIONS["light"]
    assert views.crop_scale_min == 0.5
    odds = (views.jitter_probability, views.gray_probability, views.blur_probability)
    assert (*odds, views.flip_probability) == (0, 0, 0, 0)


def test_slips_own_views_differ_from_moco_v2_in_the_crop_alone():
    slip, moco = vars(AUGMENTATIONS["slip_ssl"]), vars(AUGMENTATIONS["moco_v2"])
    assert slip["crop_scale_min"] == 0.08
    assert {name for name in slip if slip[name] != moco[name]} == {"crop_scale_min"}
