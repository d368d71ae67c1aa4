#pragma once

#include <cstddef>
#include <cstdint>

// Calls a launcher with its params struct. Null, or what went wrong: an error code, or a misuse that the runtime found.
extern "C" __attribute__((visibility("default"))) const char* cuda_on_cpu_call(const char* op, const void* params, size_t params_size,
                                                                              uint64_t seed);
