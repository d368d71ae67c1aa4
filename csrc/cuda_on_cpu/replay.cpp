// Calls launchers as a file of cases says, and writes what they wrote: a process of its own for builds with sanitizers, and for kernels that
// may crash it. tests/test_cuda_on_cpu.py writes the file and reads the answer. Usage: replay CASES ANSWERS
//
//   cases:  {u64 length, op's name; u64 size, params; u64 seed; u64 buffers, each
//            {u64 rows, row_bytes, stride_bytes; u64 lead; u64 pointers, each {u64 offset in params, u64 bytes into the buffer}; u64 written;
//             rows·row_bytes bytes}}
//   answer: for each case {u64 length, message or nothing; the bytes of its written buffers}
//
// A buffer of one row is an allocation of just its size that begins `lead` bytes after a multiple of 16, so that AddressSanitizer sees its
// ends. One of several rows is a sparse mapping, whose rows may lie gigabytes apart.

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "exports.hpp"

namespace {

struct Pointer {
  uint64_t offset, bytes;
};

struct Buffer {
  uint64_t rows, row_bytes, stride_bytes, lead, written;
  std::vector<Pointer> pointers;
  char* memory = nullptr;  // as allocated
  char* data = nullptr;

  bool is_sparse() const { return rows > 1; }
  uint64_t size() const { return is_sparse() ? (rows - 1) * stride_bytes + row_bytes : row_bytes; }
};

[[noreturn]] void stop(const char* why) {
  std::fprintf(stderr, "replay: %s\n", why);
  std::exit(2);
}

void read(FILE* file, void* to, uint64_t size) {
  if (size != 0 && std::fread(to, 1, size, file) != size) stop("the file of cases ends early");
}

uint64_t read_number(FILE* file) {
  uint64_t number;
  read(file, &number, sizeof number);
  return number;
}

Buffer read_buffer(FILE* file) {
  Buffer buffer;
  buffer.rows = read_number(file);
  buffer.row_bytes = read_number(file);
  buffer.stride_bytes = read_number(file);
  buffer.lead = read_number(file);
  buffer.pointers.resize(read_number(file));
  for (Pointer& pointer : buffer.pointers) pointer = {read_number(file), read_number(file)};
  buffer.written = read_number(file);
  if (buffer.is_sparse()) {
    void* memory = mmap(nullptr, buffer.size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) stop("no address space for a sparse buffer");
    buffer.memory = static_cast<char*>(memory);
  } else if (void* memory = nullptr; posix_memalign(&memory, 16, buffer.lead + buffer.size()) == 0) {
    buffer.memory = static_cast<char*>(memory);
  } else {
    stop("out of memory");
  }
  buffer.data = buffer.memory + buffer.lead;
  for (uint64_t row = 0; row < buffer.rows; ++row) read(file, buffer.data + row * buffer.stride_bytes, buffer.row_bytes);
  return buffer;
}

void write(FILE* file, const void* from, uint64_t size) {
  if (size != 0 && std::fwrite(from, 1, size, file) != size) stop("cannot write the answer");
}

void run_case(const std::string& name, FILE* cases, FILE* answers) {
  std::vector<char> params(read_number(cases));
  read(cases, params.data(), params.size());
  const uint64_t seed = read_number(cases);
  std::vector<Buffer> buffers(read_number(cases));
  for (Buffer& buffer : buffers) {
    buffer = read_buffer(cases);
    for (const Pointer& pointer : buffer.pointers) {
      const char* address = buffer.data + pointer.bytes;
      if (pointer.offset + sizeof address > params.size()) stop("a pointer lies outside the params");
      std::memcpy(params.data() + pointer.offset, &address, sizeof address);
    }
  }
  const char* message = cuda_on_cpu_call(name.c_str(), params.data(), params.size(), seed);
  const uint64_t length = message ? std::strlen(message) : 0;
  write(answers, &length, sizeof length);
  write(answers, message, length);
  for (Buffer& buffer : buffers) {
    for (uint64_t row = 0; buffer.written && row < buffer.rows; ++row)
      write(answers, buffer.data + row * buffer.stride_bytes, buffer.row_bytes);
    if (buffer.is_sparse())
      munmap(buffer.memory, buffer.size());
    else
      std::free(buffer.memory);
  }
}

}  // namespace

int main(int argc, char** argv) {
  FILE* cases = argc == 3 ? std::fopen(argv[1], "rb") : nullptr;
  FILE* answers = argc == 3 ? std::fopen(argv[2], "wb") : nullptr;
  if (!cases || !answers) stop("usage: replay CASES ANSWERS");
  for (uint64_t length; std::fread(&length, sizeof length, 1, cases) == 1;) {
    std::string name(length, '\0');
    read(cases, name.data(), length);
    run_case(name, cases, answers);
    std::fflush(answers);
  }
  std::fclose(cases);
  return std::fclose(answers);
}
