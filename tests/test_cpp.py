"""A converted model in a C++ program, where there is no Python and no explicit_wn."""

import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from tcn import TemporalConvNet

import explicit_wn

COMPILER = shutil.which("g++") or shutil.which("clang++")

MAIN = """
#include <torch/script.h>
#include <iostream>

int main(int count, char** arguments) {
    torch::NoGradGuard no_grad;
    auto model = torch::jit::load(arguments[1]);
    auto input = torch::arange(2 * 3 * 16).to(torch::kFloat).reshape({2, 3, 16}) / 100;
    auto output = model.forward({input}).toTensor().flatten();
    std::cout.precision(9);
    for (int64_t index = 0; index < output.numel(); ++index) std::cout << output[index].item<float>() << "\\n";
}
"""


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_a_converted_model_runs_in_cpp(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the hook is deprecated
        model = TemporalConvNet(torch.nn.utils.weight_norm).eval()
    explicit_wn.convert(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    torch.jit.save(explicit_wn.script(model), tmp_path / "model.pt")
    (tmp_path / "main.cpp").write_text(MAIN)
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    program = str(tmp_path / "main")
    build = [str(COMPILER), "-std=c++20", "-O0", abi, *include, str(tmp_path / "main.cpp"), "-o", program, *libraries]
    subprocess.run(build, check=True)
    run = subprocess.run([program, str(tmp_path / "model.pt")], check=True, capture_output=True, text=True)
    values = torch.tensor([float(line) for line in run.stdout.split()])
    inputs = torch.arange(2 * 3 * 16).float().reshape(2, 3, 16) / 100
    torch.testing.assert_close(values, model(inputs).detach().flatten())
