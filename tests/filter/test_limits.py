import math

import pytest

from declip_filter.limits import require_between, require_folder_name
from declip_shards import DeclipError


@pytest.mark.parametrize("value", [1, 1.0, 3, None])
def test_limits_themselves_and_none_pass(value):
    require_between("x", value, 1, 3)


@pytest.mark.parametrize("value", [0.999, 3.001, math.nan, math.inf, -math.inf])
def test_outside_is_refused_with_value_limit_and_remedy(value):
    with pytest.raises(DeclipError, match=r"^x is .*; it must be from 1 to 3\. Do this\.$"):
        require_between("x", value, 1, 3, remedy="Do this.")


def test_one_sided_limit_says_so():
    with pytest.raises(DeclipError, match=r"x is 0; it must be at least 1\. Choose another\."):
        require_between("x", 0, 1)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", ".hidden", "a b", "é", "-x", "a\n"])
def test_names_that_are_no_folder_are_refused(name):
    with pytest.raises(DeclipError, match="it must be one folder name"):
        require_folder_name("name", name)


@pytest.mark.parametrize("name", ["default", "v1.2", "a_b-c", "7"])
def test_plain_names_pass(name):
    require_folder_name("name", name)
