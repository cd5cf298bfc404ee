"""The ledger of an evaluation: a file for each setting and each process, and lines that were torn off."""

import json

from xai_companion.ledger import Ledger, writing


def test_every_setting_has_a_file_of_its_own(tmp_path):
    assert len({Ledger(tmp_path, {"explainer": {"method": "rise"}, "seed": seed}).own for seed in range(500)}) == 500


def test_what_another_process_has_written_meanwhile_is_known(tmp_path):
    config = {"explainer": {"method": "own[1]"}}
    first, second = (Ledger(tmp_path, config, rank) for rank in (0, 1))
    with writing(second):
        second.add("b", [{"x": 1}], 2.0)
    with writing(first):
        assert list(first.done) == ["b"]
        first.add("a", [], 1.5)
    assert set(Ledger(tmp_path, config).done) == {"a", "b"} and Ledger(tmp_path, config).seconds == 3.5 and first.own != second.own
    assert json.loads((tmp_path / f"{first.stem.name}.json").read_text()) == config


def test_a_torn_line_is_cut_off_by_the_next_writer_only(tmp_path):
    with writing(Ledger(tmp_path, {"explainer": {"method": "a"}})) as ledger:
        ledger.add("0:1", [], 1.0)
    whole = ledger.own.read_bytes()
    ledger.own.write_bytes(whole + b'{"batch": "1:')
    assert list(Ledger(tmp_path, {"explainer": {"method": "a"}}).done) == ["0:1"] and ledger.own.read_bytes() != whole
    with writing(ledger):
        assert ledger.own.read_bytes() == whole
