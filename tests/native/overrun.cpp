// Writes or reads past the end of a carved buffer, as a fault in a kernel would: with the sanitizer the guard ends it.
//
//     overrun PAST    touch the byte that is PAST bytes past the end of each of three buffers in turn (-1: the last own)
#define IFND_ISA overrun
#define IFND_VECTOR_BYTES 16
#include <cstdio>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "isa/tile.h"
#include "memory.h"

using namespace ifnd::overrun;

// Sizes that have to be multiples can't be made of plain numbers, nor of other multiples.
static_assert(!std::is_convertible<int, Multiple<8>>::value && !std::is_constructible<Multiple<8>, int>::value);
static_assert(std::is_same<decltype(tile_rows(1)), Multiple<8>>::value);
static_assert(std::is_convertible<Multiple<16>, Multiple<8>>::value);

int main(int argc, char** argv) {
  const long past = argc > 1 ? std::atol(argv[1]) : -1, buffer = argc > 2 ? std::atol(argv[2]) : 0;
  Carver counted{};
  const auto carve = [](Carver& carver) {
    return std::vector<char*>{carver.take<char>(64), reinterpret_cast<char*>(carver.take<float>(5)), carver.take<char>(1)};
  };
  carve(counted);
  ifnd::Scratch scratch(counted.used);
  // Carved otherwise before: what was a guard then is none now.
  Carver other{scratch.at(0)}, carver{scratch.at(0)};
  other.take<char>(3);
  const long sizes[] = {64, 20, 1};
  volatile char* at = carve(carver)[size_t(buffer)] + sizes[buffer] + past;
  *at = 1;
  std::printf("%d\n", int(*at));
}
