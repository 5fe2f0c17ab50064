// Runs models on signals that Python saved, and says how far each is from Python's outputs and from the first model's.
//
//   run_models signals.pt scripted.pt package.pt2
//
// signals.pt comes of torch.save((signal, ..., expected)), where expected is all outputs, flattened, in one tensor.
#include <ATen/Parallel.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <chrono>
#include <cstdio>
#include <fstream>

using torch::Tensor;
using Model = std::function<Tensor(Tensor)>;

// A package of AOTInductor if the name ends with .pt2, and otherwise a TorchScript file.
Model load(const std::string& path) {
    if (path.ends_with(".pt2")) {
        auto package = std::make_shared<torch::inductor::AOTIModelPackageLoader>(path);
        return [package](Tensor signal) { return package->run({signal}).at(0); };
    }
    auto module = torch::jit::load(path);
    return [module](Tensor signal) mutable { return module.forward({signal}).toTensor(); };
}

double largest_difference(Tensor one, Tensor other) { return (one - other).abs().max().item<double>(); }

double milliseconds(Model& model, Tensor signal) {
    auto started = std::chrono::steady_clock::now();
    model(signal);
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - started).count();
}

int main(int count, char** paths) {
    torch::InferenceMode inference;
    at::set_num_threads(1);
    std::ifstream file(count > 2 ? paths[1] : "", std::ios::binary);
    if (!file) return std::fprintf(stderr, "usage: %s signals.pt model...\n", paths[0]), 1;
    auto saved = torch::jit::pickle_load({std::istreambuf_iterator<char>(file), {}}).toTuple()->elements().vec();
    Tensor expected = saved.back().toTensor(), first;
    saved.pop_back();
    for (int index = 2; index < count; ++index) {
        Model model = load(paths[index]);
        std::vector<Tensor> outputs;
        for (const auto& signal : saved) outputs.push_back(model(signal.toTensor()).flatten());
        Tensor all = torch::cat(outputs);
        if (index == 2) first = all;
        double fastest = milliseconds(model, saved.back().toTensor());
        for (int call = 1; call < 20; ++call) fastest = std::min(fastest, milliseconds(model, saved.back().toTensor()));
        std::printf("%s: %.1e from Python, ", paths[index], largest_difference(all, expected));
        std::printf("%.1e from the first, %.2f ms per call\n", largest_difference(all, first), fastest);
    }
}
