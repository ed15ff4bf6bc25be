from dataclasses import dataclass, field

import pytest

from declip_shards import DeclipError, Store, TaskStats, manifest


@dataclass(frozen=True, kw_only=True)
class Toy:
    root: str = field(default="", metadata={"fingerprint": False})
    size: int = 3
    names: tuple[str, ...] = ("a",)


def _receipt(store, task, digest="f", **stats):
    return manifest.make_receipt(store, task, digest, TaskStats(**stats))


def test_fingerprint_follows_settings_code_and_inputs_but_not_the_folder():
    base = manifest.fingerprint(Toy(root="/a"), "1", {"in": "x"})
    assert base == manifest.fingerprint(Toy(root="/b"), "1", {"in": "x"})
    others = [
        manifest.fingerprint(Toy(size=4), "1", {"in": "x"}),
        manifest.fingerprint(Toy(names=("b",)), "1", {"in": "x"}),
        manifest.fingerprint(Toy(), "2", {"in": "x"}),
        manifest.fingerprint(Toy(), "1", {"in": "y"}),
    ]
    assert len({base, *others}) == 5


def test_samples_that_vanish_without_a_reason_are_refused(tmp_path):
    store = Store(str(tmp_path))
    with pytest.raises(DeclipError, match="read 10 samples but accounts for 9"):
        _receipt(store, "0", num_in=10, num_out=7, reasons={"x": 2})


def test_order_of_tasks_does_not_matter_and_read_inverts_write(tmp_path):
    store = Store(str(tmp_path))
    store.write_bytes("a.bin", b"1")
    store.write_bytes("b.bin", b"22")
    receipts = [
        _receipt(store, "1", num_in=5, num_out=4, reasons={"bad": 1}, files=("b.bin",)),
        _receipt(store, "0", num_in=2, num_out=2, files=("a.bin",), extra={"x": 1}),
    ]

    def build(order):
        return manifest.build_manifest(
            step="toy", stage=Toy(), code_version="1", inputs={"in": "x"}, receipts=order
        )

    assert build(receipts) == build(receipts[::-1])
    manifest.write_manifest(store, build(receipts))
    again = manifest.read_manifest(store, "toy")
    assert again is not None
    assert again == build(receipts)
    assert (again.num_in, again.num_out, again.reasons) == (7, 6, {"bad": 1})
    for receipt in receipts:
        manifest.write_receipt(store, "toy", receipt)
    assert set(manifest.read_receipts(store, "toy")) == {"0", "1"}


def test_a_torn_manifest_counts_as_absent_and_a_future_one_is_refused(tmp_path):
    store = Store(str(tmp_path))
    store.write_bytes("manifests/toy.json", b'{"step": "to')
    assert manifest.read_manifest(store, "toy") is None
    store.write_bytes("manifests/toy.json", b'{"format_version": 99}')
    with pytest.raises(DeclipError, match="newer version"):
        manifest.read_manifest(store, "toy")


def test_damage_is_found_by_size_and_by_hash(tmp_path):
    store = Store(str(tmp_path))
    for name in ("gone", "short", "flipped", "good"):
        store.write_bytes(name, b"0123")
    receipt = _receipt(store, "0", num_in=0, num_out=0, files=("gone", "short", "flipped", "good"))
    built = manifest.build_manifest(
        step="toy", stage=Toy(), code_version="1", inputs={}, receipts=[receipt]
    )
    store.remove("gone")
    store.write_bytes("short", b"012")
    store.write_bytes("flipped", b"0133")
    assert manifest.damaged_files(store, built) == ["gone", "short"]
    assert manifest.damaged_files(store, built, deep=True) == ["flipped", "gone", "short"]
