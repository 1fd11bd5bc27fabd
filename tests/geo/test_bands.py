from __future__ import annotations

import pytest

from densedino.errors import InputError, UnknownNameError
from densedino.geo.bands import COMPOSITES, SENSORS, choose_bands, detect_sensor
from densedino.geo.raster import RasterBand


def stack(*names: str, source: str = "x.tif", colours: tuple[str, ...] = ()) -> list[RasterBand]:
    return [
        RasterBand(
            source=source,
            number=n + 1,
            description=name,
            colour=colours[n] if colours else "undefined",
            scale=1.0,
            offset=0.0,
            dtype="uint16",
            nodata=None,
        )
        for n, name in enumerate(names)
    ]


def files(*paths: str) -> list[RasterBand]:
    return [band for path in paths for band in stack("", source=path)]


def test_every_sensor_has_true_colour_in_the_visible() -> None:
    for name, bands in SENSORS.items():
        common = {band.common: band.nm for band in bands}
        if bands:
            assert common["blue"] < common["green"] < common["red"] < 700 < common["nir"], name
        assert len({band.name for band in bands}) == len(bands)


@pytest.mark.parametrize(
    ("source", "sensor"),
    [
        ("s2_B04.jp2", "sentinel-2"),
        ("T18TXR_20190817T153911_B04_10m.jp2", "sentinel-2"),
        ("S2A_MSIL2A_2019.tif", "sentinel-2"),
        ("LC08_L1TP_014032_B4.TIF", "landsat-8"),
        ("LC09_L2SP_014032_SR_B4.TIF", "landsat-9"),
        ("LE07_L1TP_B3.TIF", "landsat-7"),
        ("lsat7_2000_30.tif", "landsat-7"),
        ("m_4207445_nw_naip.tif", "naip"),
        ("20200101_PSScene_3B_AnalyticMS.tif", "planet"),
        ("holiday_s2000.png", "generic"),
        ("plan.tif", "generic"),
    ],
)
def test_names_tell_the_sensor(source, sensor) -> None:
    assert detect_sensor(files(source)) == sensor


def test_a_spacecraft_or_b8a_tells_it_too() -> None:
    assert detect_sensor(files("a.tif"), hint="LANDSAT_8") == "landsat-8"
    assert detect_sensor(files("a.tif"), hint="Sentinel-2A") == "sentinel-2"
    assert detect_sensor(stack("B02", "B8A")) == "sentinel-2"


def test_files_of_bands_are_named_by_their_files() -> None:
    chosen = choose_bands(files("s2_B02.jp2", "s2_B8A.jp2", "s2_B04.jp2", "s2_B03.jp2"))
    assert (chosen.sensor, chosen.places, chosen.names) == ("sentinel-2", (2, 3, 0), ("B4", "B3", "B2"))
    assert chosen.nm == (665, 560, 490)


@pytest.mark.parametrize(
    ("sensor", "count", "places"),
    [
        ("sentinel-2", 13, (3, 2, 1)),
        ("sentinel-2", 12, (3, 2, 1)),
        ("landsat-7", 6, (2, 1, 0)),
        ("landsat-8", 7, (3, 2, 1)),
        ("naip", 4, (0, 1, 2)),
        ("planet", 4, (2, 1, 0)),
        ("planet-8", 8, (5, 3, 1)),
    ],
)
def test_unnamed_stacks_are_in_the_publishers_order(sensor, count, places) -> None:
    assert choose_bands(stack(*[""] * count), sensor=sensor).places == places


def test_composites_are_of_what_they_say() -> None:
    bands = stack(*[""] * 13)
    for name, commons in COMPOSITES.items():
        chosen = choose_bands(bands, want=name, sensor="sentinel-2")
        table = {band.name: band.common for band in SENSORS["sentinel-2"]}
        assert tuple(table[band] for band in chosen.names) == commons


@pytest.mark.parametrize(
    "want", ["B4,B3,B2", "b04,b03,b02", "red,green,blue", "665,560,490", "650nm,570nm,480nm", "4,3,2"]
)
def test_bands_can_be_asked_for_in_many_ways(want) -> None:
    assert choose_bands(stack(*[""] * 13), want=want, sensor="sentinel-2").places == (3, 2, 1)


def test_colour_interpretation_and_names_of_generic_files() -> None:
    colours = ("nir", "blue", "green", "red", "alpha")
    assert choose_bands(stack(*[""] * 5, colours=colours)).places == (3, 2, 1)
    assert choose_bands(stack("Blue", "Green", "Red", "x")).places == (2, 1, 0)
    assert choose_bands(stack("", "", "")).places == (0, 1, 2)
    assert choose_bands(stack("")).places == (0,)


def test_as_many_channels_as_bands() -> None:
    chosen = choose_bands(stack(*[""] * 6, colours=("undefined",) * 5 + ("alpha",)), channels=5)
    assert chosen.places == (0, 1, 2, 3, 4)
    assert choose_bands(stack(*[""] * 5), want="5,1", channels=2).places == (4, 0)


@pytest.mark.parametrize(
    ("bands", "options", "error", "message"),
    [
        (stack(*[""] * 40), {}, InputError, "40 bands and nothing says which are red, green and blue"),
        (stack("", ""), {}, InputError, "2 bands and nothing says"),
        (stack(*[""] * 13), {"sensor": "sentinel-3"}, UnknownNameError, "did you mean 'sentinel-2'"),
        (stack(*[""] * 13), {"sensor": "sentinel-2", "want": "true-color"}, UnknownNameError, "mean 'true-colour'"),
        (stack(*[""] * 13), {"sensor": "sentinel-2", "want": "B4,B3,B99"}, InputError, "no band 'B99'"),
        (stack(*[""] * 13), {"sensor": "sentinel-2", "want": "3000,560,490"}, InputError, "no band '3000'"),
        (stack(*[""] * 13), {"sensor": "sentinel-2", "want": "4,3,14"}, InputError, "no band '14'"),
        (
            stack(*[""] * 13),
            {"sensor": "sentinel-2", "want": "4,3"},
            InputError,
            "2 bands .* for a model of 3 channels",
        ),
        (stack(*[""] * 5), {"channels": 12}, InputError, "5 bands .* for a model of 12 channels"),
        (files("s2_B02.jp2", "s2_B03.jp2"), {}, InputError, "B2 .blue, 490 nm.*--bands"),
    ],
)
def test_what_cannot_be_found_is_said(bands, options, error, message) -> None:
    with pytest.raises(error, match=message):
        choose_bands(bands, **options)
