"""What make setup says about the torch it got."""

from tools.check_torch import problem


def test_the_right_build_is_fine() -> None:
    assert problem("cpu", 0, "2.13.0+cpu cpu\n", "") is None
    assert problem("gpu", 0, "2.13.0 13.0\n", "") is None


def test_a_cuda_build_in_the_cpu_environment_names_what_to_do() -> None:
    line = problem("cpu", 0, "2.13.0 13.0\n", "")
    assert line is not None
    assert line.startswith("torch 2.13.0 is built for 13.0; a CPU build is needed")
    assert "PIP_EXTRA_INDEX_URL" in line


def test_a_cpu_build_in_the_gpu_environment_names_what_to_do() -> None:
    line = problem("gpu", 0, "2.13.0+cpu cpu\n", "")
    assert line is not None
    assert "a CUDA build is needed" in line


def test_a_torch_that_does_not_import_says_why() -> None:
    line = problem("cpu", 1, "", "Traceback\nImportError: libcudart.so.13: cannot open shared object file\n")
    assert line is not None
    assert line.startswith("torch can't be imported (ImportError: libcudart.so.13: cannot open shared object file); a CPU build is needed")


def test_a_torch_that_dies_without_a_word_says_so() -> None:
    line = problem("cpu", -11, "", "")
    assert line is not None
    assert "exit code -11" in line
