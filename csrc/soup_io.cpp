#include "soup_io.h"

#include <fcntl.h>

namespace fastalign {

int64_t input_room(const SoupSegment& of, int64_t chunk) {
  int64_t bytes = 0;
  for (SoupType type : of.in_types) bytes += aligned(chunk * size_of(type));
  return bytes;
}

SoupFailure read_inputs(const void** ins, char* room, const SoupSegment& of, int segment, int64_t first, int64_t n,
                        int64_t chunk) {
  for (int i = 0; i < int(of.in_files.size()); ++i) {
    const int64_t size = size_of(of.in_types[i]);
    const int error = whole([&](char* to, size_t bytes, off_t at) { return pread(of.in_files[i], to, bytes, at); }, room,
                            n * size, of.in_offsets[i] + first * size);
    if (error != 0) return {true, false, error < 0 ? 0 : error, segment, i};
    ins[i] = room;
    room += aligned(chunk * size);
  }
  return {};
}

void read_ahead(const SoupSegment& of) {
#if defined(POSIX_FADV_WILLNEED)
  for (size_t i = 0; i < of.in_files.size(); ++i) {
    posix_fadvise(of.in_files[i], of.in_offsets[i], of.n * size_of(of.in_types[i]), POSIX_FADV_WILLNEED);
  }
#else
  (void)of;
#endif
}

char* line_in(const std::unique_ptr<char[]>& memory) {
  return reinterpret_cast<char*>(aligned(int64_t(reinterpret_cast<uintptr_t>(memory.get()))));
}

int64_t before_page(const SoupSegment& of, SoupType out_type) {
  if (of.out_offsets.empty()) return 0;
  const int64_t size = size_of(out_type), left = -of.out_offsets[0] & 4095;
  return left % size == 0 && left / size < of.n ? left / size : 0;
}

SoupFailure write_output(void* out, SoupType out_type, const SoupSegment& of, int segment, int k, int64_t first, int64_t n) {
  const int64_t size = size_of(out_type);
  const int error = whole([&](char* from, size_t bytes, off_t at) { return pwrite(of.out_files[k], from, bytes, at); },
                          static_cast<char*>(out), n * size, of.out_offsets[k] + first * size);
  if (error != 0) return {true, true, error < 0 ? EIO : error, segment, k};
  return {};
}

static void count(SoupSeen::Count* to, int64_t bad, int segment, int64_t first) {
  const bool earlier = segment < to->segment || (segment == to->segment && first < to->first);
  if (to->count == 0 || earlier) to->segment = segment, to->first = first;
  to->count += bad;
}

bool see_inputs(SoupSeen* seen, const SoupSegment& of, int segment, const void* const* ins, int64_t first, int64_t n) {
  bool finite = true;
  for (int i = 0; i < int(of.in_types.size()); ++i) {
    int64_t at = 0;
    const int64_t bad = FASTALIGN_CALL(soup_not_finite, ins[i], of.in_types[i], n, &at);
    if (bad == 0) continue;
    finite = false;
#pragma omp critical(soup_seen)
    count(&seen->inputs[size_t(i)], bad, segment, first + at);
  }
  return finite;
}

void see_output(SoupSeen* seen, const SoupSegment& of, int segment, int k, const void* out, SoupType out_type, int64_t first,
                int64_t n, const std::function<bool()>& finite, const std::function<void(void*)>& again) {
  const int64_t size = size_of(out_type);
  const SoupDigest digest = seen->digesting ? digest_of(out, n * size, of.out_offsets[k] + first * size) : 0;
  int64_t at = 0, bad = 0;
  if (out_type == SoupType::float8_e4m3fn) {
    const auto* bytes = static_cast<const uint8_t*>(out);
    bool most = false;
    for (int64_t j = 0; j < n; ++j) most |= (bytes[j] & 0x7f) == 0x7e;
    if (most && finite()) {
      std::vector<float> wide(static_cast<size_t>(n));
      again(wide.data());
      for (int64_t j = n - 1; j >= 0; --j) {
        if (wide[size_t(j)] < -464 || wide[size_t(j)] > 464) ++bad, at = j;  // beyond what rounds to 448
      }
    }
  }
  if (bad == 0) {
    bad = FASTALIGN_CALL(soup_not_finite, out, out_type, n, &at);
    if (bad != 0 && !finite()) bad = 0;
  }
  if (bad == 0 && !seen->digesting) return;
#pragma omp critical(soup_seen)
  {
    seen->digests[size_t(k)] += digest;
    if (bad != 0) count(&seen->outputs[size_t(k)], bad, segment, first + at);
  }
}

int allocate(int file, int64_t bytes) {
#if defined(__linux__)
  if (bytes > 0) {
    int done;
    do done = fallocate(file, 0, 0, off_t(bytes));
    while (done != 0 && errno == EINTR);
    if (done == 0) return 0;
    if (errno != EOPNOTSUPP && errno != ENOSYS && errno != EINVAL) return errno;
  }
#endif
  return ftruncate(file, off_t(bytes)) == 0 ? 0 : errno;
}

void write_behind(int file) {
#if defined(__linux__)
  sync_file_range(file, 0, 0, SYNC_FILE_RANGE_WRITE);
#else
  (void)file;
#endif
}

}  // namespace fastalign
