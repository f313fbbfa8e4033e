// An extended Kalman filter on a robot: the control loop of jactri/examples/kalman.py, in C++ without Python.
//
// step.pt2 is what jactri.export wrote: a learned time step of a pendulum, as machine code, from a state (1, 2) to the
// next state (1, 2) and its Jacobian (1, 2, 2), exact, in one call. This program carries a state and its covariance
// through it (Anderson and Moore 1979, ch. 8.2). The camera sees the pendulum's tip, whose Jacobian is written out.
//
//   python export_step.py .      # learns the step; writes step.pt2 and sightings.txt
//   cmake -S . -B build -D CMAKE_BUILD_TYPE=Release \
//         -D CMAKE_PREFIX_PATH="$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')"
//   cmake --build build
//   build/filter step.pt2 < sightings.txt
//
// It reads sightings, a line of two numbers each, and prints the filtered state after each: an angle and a speed.
// The package runs on the version of PyTorch and the kind of machine that it was made on.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <string>

namespace {

constexpr double kKick = 0.15;  // rad/s, standard deviation of what the wind adds to the speed in a step
constexpr double kBlur = 0.2;   // m, standard deviation of a sighting, along each axis

at::Tensor matrix(at::ArrayRef<double> entries) {
  return at::tensor(entries, at::kDouble).view({2, 2});
}

void filter(const std::string& package) {
  const c10::InferenceMode no_graphs;
  torch::inductor::AOTIModelPackageLoader step(package);

  const auto eye = at::eye(2, at::kDouble);
  const auto wind = matrix({1e-6, 0, 0, kKick * kKick});
  const auto blur = kBlur * kBlur * eye;
  // Of shape (1, 2), contiguous, in double precision, as the example that was exported: a package takes no other.
  auto state = at::tensor({2.5, 0.0}, at::kDouble).view({1, 2});
  auto covariance = matrix({0.25, 0, 0, 1});

  double right = 0, up = 0;
  for (bool first = true; std::cin >> right >> up; first = false) {
    if (!first) {
      const auto found = step.run({state});  // the output, then the Jacobian
      const auto moved_by = found[1][0];
      state = found[0];
      covariance = moved_by.mm(covariance).mm(moved_by.t()) + wind;
    }
    const double angle = state[0][0].item<double>();
    const double sine = std::sin(angle), cosine = std::cos(angle);
    const auto seen_by = matrix({cosine, 0, sine, 0});
    const auto surprise = at::tensor({right - sine, up + cosine}, at::kDouble);
    const auto seen_covariance = seen_by.mm(covariance).mm(seen_by.t()) + blur;
    const auto gain = at::linalg_solve(seen_covariance, seen_by.mm(covariance)).t();
    state = state + gain.mv(surprise);
    const auto kept = eye - gain.mm(seen_by);
    covariance = kept.mm(covariance).mm(kept.t()) + gain.mm(blur).mm(gain.t());  // Joseph's form

    const double speed = state[0][1].item<double>();
    std::printf("%.17g %.17g\n", state[0][0].item<double>(), speed);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s step.pt2 < sightings.txt\n", argv[0]);
    return 2;
  }
  // Before the first call: shapes, strides and dtypes of inputs are compared with the exported example's.
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", 1);
  try {
    filter(argv[1]);
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "%s: %s\n", argv[1], error.what_without_backtrace());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[1], error.what());
    return 1;
  }
  return 0;
}
