import pytest

from tsm_core.labels import UnknownDataset, labels_of

COUNTS = {
    "kinetics400": 400,
    "sthv1": 174,
    "sthv2": 174,
    "jester": 27,
    "diving48": 48,
    "hmdb51": 51,
    "ucf101": 101,
    "motion8": 8,
}


@pytest.mark.parametrize(("dataset", "count"), COUNTS.items())
def test_every_data_set_has_its_classes(dataset, count):
    for order in ("mmaction2", "mit"):
        names = labels_of(dataset, order)
        assert len(names) == len(set(names)) == count
        assert all(name == name.strip() != "" for name in names)


def test_places_that_the_two_codebases_name_differently():
    """Spot checks of the permutations: class i of one order is class p[i] of the other."""
    jester, sthv1 = labels_of("jester"), labels_of("sthv1")
    assert [labels_of("jester", "mit").index(name) for name in jester] == [
        16, 17, 15, 18, 5, 3, 11, 12, 10, 13, 6, 4, 8, 7, 21, 22, 23, 25, 24, 26, 20, 19, 9, 14, 1, 2, 0,
    ]  # fmt: skip
    places = [labels_of("sthv1", "mit").index(name) for name in sthv1]
    assert places[:8] == [16, 164, 166, 144, 167, 46, 0, 47]
    assert places[-7:] == [137, 54, 111, 96, 58, 136, 51]
    assert labels_of("sthv2") == labels_of("sthv1", "mit")


@pytest.mark.parametrize(
    ("dataset", "pairs"),
    [
        ("sthv1", [(2, 4), (30, 41), (52, 66)]),
        ("sthv2", [(166, 167), (93, 94), (86, 87)]),
        ("jester", [(0, 1), (6, 7)]),
    ],
)
def test_mirrored_classes_differ_by_left_and_right(dataset, pairs):
    names = [name.lower() for name in labels_of(dataset)]
    for one, other in pairs:
        swapped = names[one].replace("left", "\0").replace("right", "left").replace("\0", "right")
        assert swapped == names[other]


def test_known_places():
    assert labels_of("kinetics400")[6] == "arm wrestling"
    assert labels_of("hmdb51") == tuple(sorted(labels_of("hmdb51")))
    assert (labels_of("ucf101")[0], labels_of("ucf101")[100]) == ("ApplyEyeMakeup", "YoYo")
    assert labels_of("diving48")[0] == "Back+15som+05Twis+FREE"
    assert labels_of("jester", "mit")[2] == "No gesture"


def test_unknown_data_set_lists_what_exists():
    with pytest.raises(UnknownDataset, match=r"'k600' does not exist; there are .*kinetics400.*sthv2"):
        labels_of("k600")
