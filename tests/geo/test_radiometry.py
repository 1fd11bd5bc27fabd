from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import rasterio

from densedino.errors import ImageError, InputError
from densedino.geo.bands import choose_bands
from densedino.geo.radiometry import find_product, make_scaling, read_product
from densedino.geo.raster import Scene

MTL = """GROUP = LANDSAT_METADATA_FILE
  GROUP = IMAGE_ATTRIBUTES
    SPACECRAFT_ID = "LANDSAT_8"
    SUN_ELEVATION = 30.00000000
  END_GROUP = IMAGE_ATTRIBUTES
  {surface}GROUP = LEVEL1_RADIOMETRIC_RESCALING
    REFLECTANCE_MULT_BAND_4 = 2.0000E-05
    REFLECTANCE_ADD_BAND_4 = -0.100000
  END_GROUP = LEVEL1_RADIOMETRIC_RESCALING
END_GROUP = LANDSAT_METADATA_FILE
END
"""
SURFACE = """GROUP = LEVEL2_SURFACE_REFLECTANCE_PARAMETERS
    REFLECTANCE_MULT_BAND_4 = 2.75e-05
    REFLECTANCE_ADD_BAND_4 = -0.2
  END_GROUP = LEVEL2_SURFACE_REFLECTANCE_PARAMETERS
  """
MTD = """<?xml version="1.0"?>
<n1:Level-2A_User_Product xmlns:n1="https://psd-14.sentinel2.eo.esa.int/PSD/User_Product_Level-2A.xsd">
 <Product_Info><Datatake><SPACECRAFT_NAME>Sentinel-2B</SPACECRAFT_NAME></Datatake></Product_Info>
 <QUANTIFICATION_VALUES_LIST>
 <BOA_QUANTIFICATION_VALUE unit="none">10000</BOA_QUANTIFICATION_VALUE>
 </QUANTIFICATION_VALUES_LIST>
 <BOA_ADD_OFFSET_VALUES_LIST><BOA_ADD_OFFSET band_id="3">-1000</BOA_ADD_OFFSET></BOA_ADD_OFFSET_VALUES_LIST>
</n1:Level-2A_User_Product>
"""
PLANET = """<?xml version="1.0"?><ps:EarthObservation xmlns:ps="http://schemas.planet.com/ps">
<ps:bandSpecificMetadata><ps:bandNumber>3</ps:bandNumber><ps:reflectanceCoefficient>2.1e-05</ps:reflectanceCoefficient>
</ps:bandSpecificMetadata></ps:EarthObservation>"""


@pytest.mark.parametrize(
    ("text", "name", "spacecraft", "band", "gain", "offset"),
    [
        (MTL.format(surface=""), "a_MTL.txt", "LANDSAT_8", "B4", 4e-5, -0.2),  # divided by sin 30°
        (MTL.format(surface=SURFACE), "a_MTL.txt", "LANDSAT_8", "B4", 2.75e-5, -0.2),
        (
            "<M><IMAGE><SPACECRAFT_ID>LANDSAT_7</SPACECRAFT_ID><SUN_ELEVATION>90</SUN_ELEVATION></IMAGE><R>"
            "<REFLECTANCE_MULT_BAND_4>0.001</REFLECTANCE_MULT_BAND_4><REFLECTANCE_ADD_BAND_4>0.5</REFLECTANCE_ADD_BAND_4>"
            "</R></M>",
            "a_MTL.xml",
            "LANDSAT_7",
            "B4",
            0.001,
            0.5,
        ),
        (MTD, "MTD_MSIL2A.xml", "Sentinel-2B", "B4", 1e-4, -0.1),
        (MTD, "MTD_MSIL2A.xml", "Sentinel-2B", "B8A", 1e-4, 0.0),
        (PLANET, "a_metadata.xml", "planet", "B3", 2.1e-5, 0.0),
    ],
)
def test_metadata_of_products(tmp_path, text, name, spacecraft, band, gain, offset) -> None:
    (tmp_path / name).write_text(text)
    found = find_product([str(tmp_path / "scene_B4.tif")])
    assert found is not None and found.spacecraft == spacecraft
    assert found.gains[band] == pytest.approx((gain, offset))


@pytest.mark.parametrize("text", ["", "<broken", "<a><b/></a>", "GROUP = A\nEND_GROUP = A\n"])
def test_damaged_metadata_is_named(tmp_path, text) -> None:
    (tmp_path / "a_MTL.txt").write_text(text)
    with pytest.raises(ImageError, match=r"a_MTL.txt"):
        read_product(tmp_path / "a_MTL.txt")


def scaling_of(path, *, scale="auto", sensor="auto", **options):
    with Scene([path]) as scene:
        chosen = choose_bands(scene.bands, sensor=sensor, want=options.get("want", "auto"))
        return scene, make_scaling(scene, chosen, scale=scale, product=find_product([path])), chosen


def test_eight_bits_stay_as_they_are(write_raster, picture) -> None:
    array = picture(20, 20)
    _, scaling, _ = scaling_of(write_raster(array))
    values, white = scaling.apply(array, np.ones((20, 20), bool))
    assert (scaling.kind, white, values.dtype) == ("none", 255, np.uint8)
    np.testing.assert_array_equal(values, array.transpose(1, 2, 0))


def test_reflectance_by_metadata_goes_to_a_white_of_its_wavelength(write_raster) -> None:
    array = np.full((4, 20, 20), 3000, np.uint16)
    path = write_raster(array, "T18TXR_20190817T153911.tif")
    Path(path).with_name("MTD_MSIL2A.xml").write_text(MTD)
    with rasterio.open(path, "r+") as file:
        file.descriptions = ("B2", "B3", "B4", "B8")
    _, scaling, chosen = scaling_of(path, want="B8,B4,B3")
    values, white = scaling.apply(array[list(chosen.places)], np.ones((20, 20), bool))
    assert (scaling.kind, white) == ("physical", 1.0)
    # B8: 0.3 of 0.6; B4: (3000 - 1000) / 10000 of 0.3; B3: 0.3 of 0.3.
    np.testing.assert_allclose(values[0, 0], [0.5, 0.2 / 0.3, 1.0], rtol=1e-5)


def test_scale_and_offset_of_the_raster_itself(write_raster) -> None:
    path = write_raster(np.full((3, 20, 20), 1000, np.int16))
    with rasterio.open(path, "r+") as file:
        file.scales, file.offsets = (1e-4,) * 3, (0.05,) * 3
    _, scaling, _ = scaling_of(path)
    assert scaling.apply(np.full((3, 1, 1), 1000), np.ones((1, 1), bool))[0][0, 0] == pytest.approx([0.5] * 3)


def test_percentiles_are_of_the_whole_scene(write_raster) -> None:
    ramp = np.arange(400 * 500, dtype=np.float32).reshape(1, 400, 500) - 1000
    ramp[0, :, :10] = np.nan
    _, scaling, _ = scaling_of(write_raster(ramp))
    real = ramp[np.isfinite(ramp)]
    low, high = np.percentile(real, [2, 98])
    assert scaling.kind == "percentile"
    assert (scaling.gains[0], scaling.offsets[0]) == pytest.approx((1 / (high - low), -low / (high - low)), rel=1e-3)
    values, _ = scaling.apply(ramp, np.isfinite(ramp[0]))
    assert np.isfinite(values).all() and values.min() == 0 and values.max() == 1


def test_a_range_in_the_files_numbers(write_raster) -> None:
    _, scaling, _ = scaling_of(write_raster(np.zeros((3, 20, 20), np.uint16)), scale="100:300")
    values, _ = scaling.apply(np.array([0, 100, 200, 300, 999]).reshape(1, 1, 5).repeat(3, 0), np.ones((1, 5), bool))
    assert values[0, :, 0] == pytest.approx([0, 0, 0.5, 1, 1])


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ("none", "for 8-bit scenes"),
        ("physical", "no calibration to reflectance"),
        ("300:100", "scale '300:100'"),
        ("x", "x"),
    ],
)
def test_scales_that_cannot_be_had(write_raster, scale, message) -> None:
    with pytest.raises(InputError, match=message):
        scaling_of(write_raster(np.zeros((3, 20, 20), np.uint16)), scale=scale)


def test_a_scene_of_nothing_says_so(write_raster) -> None:
    path = write_raster(np.zeros((3, 20, 20), np.uint16), nodata=0)
    with pytest.raises(ImageError, match=r"no valid pixel: all are nodata .declared: 0.*--nodata"):
        scaling_of(path)


def test_a_frame_of_zeros_is_suspected_to_be_nothing(write_raster) -> None:
    array = np.full((3, 100, 100), 500, np.uint16)
    array[:, :20] = 0
    _, scaling, _ = scaling_of(write_raster(array))
    assert "20% of it is exactly 0, and no nodata is declared" in scaling.notes[-1]
    _, scaling, _ = scaling_of(write_raster(array, "b.tif", nodata=0))
    assert len(scaling.notes) == 1


def test_huge_floats_do_not_overflow(write_raster) -> None:
    array = np.full((1, 20, 20), 3e38, np.float32)
    array[0, 0, 0] = -3e38
    _, scaling, _ = scaling_of(write_raster(array), scale="0:1")
    values, _ = scaling.apply(array, np.ones((20, 20), bool))
    assert values[0, 0, 0] == 0 and math.isclose(values[1, 1, 0], 1)
