"""What names a run: everything its result depends on, and nothing else."""

from declip_train.loop import run_name


def test_a_run_is_named_by_what_it_depends_on():
    identity = {"settings": "a", "samples": "b", "world_size": 2, "versions": "c"}
    assert run_name(identity) == run_name(dict(reversed(identity.items())))
    for name in identity:
        assert run_name({**identity, name: "other"}) != run_name(identity)
