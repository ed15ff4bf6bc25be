// Pictures to views without Python: libjpeg-turbo decodes the rows and columns that the views need,
// resample.h resizes them into the batch. Called by compiled.py through ctypes, so without Python's
// lock. Nothing here throws or exits: what goes wrong with a picture sends it to the Python way,
// which has the last word on it.
#include <dlfcn.h>

#include <atomic>
#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

#include "jpeg_abi.h"
#include "jpeg_file.h"
#include "resample.h"

namespace declip {
namespace {

constexpr int kMargin = 4;  // columns: upsampled chroma looks two to each side
constexpr int64_t kMaxPixels = 178956970;  // MAX_PIXELS of reference.py

struct Library {
  JpegErrors *(*standard_errors)(JpegErrors *);
  void (*create)(JpegDecompressor *, int version, size_t size);
  void (*destroy)(JpegDecompressor *);
  void (*from_memory)(JpegDecompressor *, const unsigned char *, unsigned long);
  int (*read_header)(JpegDecompressor *, int require_image);
  int (*start)(JpegDecompressor *);
  unsigned int (*read_rows)(JpegDecompressor *, unsigned char **rows, unsigned int count);
  unsigned int (*skip_rows)(JpegDecompressor *, unsigned int count);
  void (*crop_columns)(JpegDecompressor *, unsigned int *left, unsigned int *width);
};

Library library;
bool is_open = false;

struct Box {
  int top, left, height, width;
};

// Columns and rows of a picture as stored, decoded.
struct Region {
  std::vector<uint8_t> bytes;
  int64_t stride = 0;
  Box box{};             // of the stored picture
  int64_t offset = 0;    // where the box's first pixel lies in `bytes`
  const uint8_t *at(int row, int column) const { return bytes.data() + offset + row * stride + column * 3; }
};

// One of libjpeg's objects. Made anew for every picture: it would keep tables, and a file that
// lacks its own would be decoded by those of the one before.
class Decoder {
 public:
  Decoder() {
    state_.errors = library.standard_errors(&errors_);
    errors_.fail = fail;
    errors_.message = message;
    state_.client = this;
  }
  Decoder(const Decoder &) = delete;
  Decoder &operator=(const Decoder &) = delete;

  // Whether the library takes our layout of its structures.
  bool usable() {
    if (setjmp(escape_) != 0) return false;
    library.create(&state_, kJpegVersion, sizeof(JpegDecompressor));
    library.destroy(&state_);
    return true;
  }

  // Decode at least `box` of a plain JPEG. False if libjpeg complains of anything.
  bool decode(const uint8_t *data, int64_t length, const JpegFile &file, const Box &box, Region &region) {
    region.box = box;
    volatile bool decoded = false;  // outlives a jump
    // No object with a destructor may live in a function that is jumped out of.
    if (setjmp(escape_) == 0) {
      library.create(&state_, kJpegVersion, sizeof(JpegDecompressor));
      decoded = run(data, length, file, region);
    }
    library.destroy(&state_);
    return decoded;
  }

 private:
  bool run(const uint8_t *data, int64_t length, const JpegFile &file, Region &region) {
    library.from_memory(&state_, data, static_cast<unsigned long>(length));
    if (library.read_header(&state_, 1) != 1) return false;
    const int space = state_.jpeg_color_space;
    if (int(state_.image_width) != file.width || int(state_.image_height) != file.height) return false;
    if (state_.num_components != file.components) return false;
    if (space != kGray && space != kRgb && space != kYcbcr) return false;
    state_.out_color_space = kRgb;
    library.start(&state_);
    // Of a picture of several scans all coefficients are there by now. Their pixels may depend on
    // blocks around them (smoothing of what later scans left out), so all columns are made.
    unsigned int left = 0, columns = state_.output_width;
    if (file.one_scan && region.box.width + 2 * kMargin < file.width) {
      left = unsigned(std::max(region.box.left - kMargin, 0));
      columns = unsigned(std::min(region.box.left + region.box.width + kMargin, file.width)) - left;
      library.crop_columns(&state_, &left, &columns);
    }
    region.stride = int64_t(columns) * 3;
    return read(file, region, int(left));
  }

  bool read(const JpegFile &file, Region &region, int left) {
    const int top = file.one_scan ? region.box.top : 0;
    const int bottom = region.box.top + region.box.height;
    const int64_t needed = int64_t(bottom - top) * region.stride + kOverread;
    if (!make_room(region.bytes, needed)) return false;
    if (top > 0 && int(library.skip_rows(&state_, unsigned(top))) != top) return false;
    for (int row = top; row < bottom;) {
      unsigned char *rows[16];
      const int count = std::min(bottom - row, 16);
      for (int slot = 0; slot < count; ++slot) rows[slot] = region.bytes.data() + (row - top + slot) * region.stride;
      const int done = int(library.read_rows(&state_, rows, unsigned(count)));
      if (done < 1) return false;
      row += done;
    }
    region.offset = (region.box.top - top) * region.stride + int64_t(region.box.left - left) * 3;
    return true;
  }

  static bool make_room(std::vector<uint8_t> &bytes, int64_t needed) {
    try {
      if (int64_t(bytes.size()) < needed) bytes.resize(size_t(needed));
    } catch (const std::exception &) {
      return false;
    }
    return true;
  }

  [[noreturn]] static void fail(JpegState *state) {
    std::longjmp(static_cast<Decoder *>(state->client)->escape_, 1);
  }
  // Damaged data decode to something; what, Pillow decides.
  static void message(JpegState *state, int level) {
    if (level < 0) fail(state);
  }

  JpegDecompressor state_{};
  JpegErrors errors_{};
  std::jmp_buf escape_{};
};

// Where the upright picture's box lies in the picture as stored.
Box stored_box(const Box &box, const JpegFile &file) {
  Box stored = file.turned() ? Box{box.left, box.top, box.width, box.height} : box;
  const int turn = file.orientation;
  if (turn == 3 || turn == 4 || turn == 6 || turn == 7) stored.top = file.height - stored.top - stored.height;
  if (turn == 2 || turn == 3 || turn == 7 || turn == 8) stored.left = file.width - stored.left - stored.width;
  return stored;
}

// Copy a region upright: (rows x columns x 3), rows `stride` bytes apart.
void turn_upright(const Region &region, const JpegFile &file, uint8_t *out, int64_t stride) {
  const Box &box = region.box;
  const int turn = file.orientation;
  const bool upside = turn == 3 || turn == 4 || turn == 6 || turn == 7;
  const bool mirrored = turn == 2 || turn == 3 || turn == 7 || turn == 8;
  for (int row = 0; row < box.height; ++row) {
    const uint8_t *pixel = region.at(upside ? box.height - 1 - row : row, mirrored ? box.width - 1 : 0);
    uint8_t *target = file.turned() ? out + row * 3 : out + row * stride;
    const int64_t step = file.turned() ? stride : 3;
    for (int column = 0; column < box.width; ++column) {
      std::memcpy(target, pixel, 3);
      pixel += mirrored ? -3 : 3;
      target += step;
    }
  }
}

bool lies_within(const Box &box, const JpegFile &file) {
  return box.top >= 0 && box.left >= 0 && box.height >= 1 && box.width >= 1 &&
         box.height <= file.upright_height() - box.top && box.width <= file.upright_width() - box.left;
}

// A picture that the compiled way takes: plain, not too large, not cut off.
bool is_ours(const uint8_t *data, int64_t length, JpegFile &file) {
  return read_jpeg(data, length, file) && int64_t(file.height) * file.width <= kMaxPixels &&
         (!file.one_scan || is_whole(data, length, file.entropy));
}

struct Batch {
  const uint8_t *const *data;
  const int64_t *lengths;
  int64_t count;
  int views;
  const int32_t *boxes;  // views x count x 4
  const uint8_t *flips;  // views x count
  int size;
  uint8_t *out;  // views x count x size x size x 3
  uint8_t *done;  // count
};

// What a thread keeps from picture to picture.
class Worker {
 public:
  explicit Worker(bool vectors) : resampler_(vectors) {}

  bool views(const Batch &batch, int64_t index) {
    JpegFile file;
    if (!is_ours(batch.data[index], batch.lengths[index], file)) return false;
    Box all{};
    for (int view = 0; view < batch.views; ++view) {
      const Box box = box_of(batch, view, index);
      if (!lies_within(box, file)) return false;
      all = view == 0 ? box : united(all, box);
    }
    if (!decoder_.decode(batch.data[index], batch.lengths[index], file, stored_box(all, file), region_)) return false;
    const uint8_t *pixels = region_.at(0, 0), *limit = region_.bytes.data() + region_.bytes.size();
    int64_t stride = region_.stride;
    if (file.orientation != 1) {
      stride = int64_t(all.width) * 3;
      upright_.resize(size_t(stride) * size_t(all.height) + kOverread);
      turn_upright(region_, file, upright_.data(), stride);
      pixels = upright_.data();
      limit = pixels + upright_.size();
    }
    for (int view = 0; view < batch.views; ++view) {
      const Box box = box_of(batch, view, index);
      const uint8_t *start = pixels + (box.top - all.top) * stride + int64_t(box.left - all.left) * 3;
      const int64_t slot = view * batch.count + index;
      resampler_.view({start, stride, box.height, box.width, limit}, batch.size, batch.flips[slot] != 0,
                      batch.out + slot * batch.size * batch.size * 3);
    }
    return true;
  }

  // The middle of the picture as stored, its shorter side resized to `size`.
  bool center_view(const uint8_t *data, int64_t length, int size, uint8_t *out) {
    JpegFile file;
    if (!is_ours(data, length, file)) return false;
    const int shorter = std::min(file.height, file.width);
    const Axis rows = Axis::middle(file.height, shorter, size), columns = Axis::middle(file.width, shorter, size);
    const Box box{rows.begin, columns.begin, rows.end - rows.begin, columns.end - columns.begin};
    if (!decoder_.decode(data, length, file, box, region_)) return false;
    const uint8_t *limit = region_.bytes.data() + region_.bytes.size();
    resampler_.view({region_.at(0, 0), region_.stride, box.height, box.width, limit}, rows, columns, size, false, out);
    return true;
  }

  // The whole picture, upright, of the size that its header says.
  bool picture(const uint8_t *data, int64_t length, uint8_t *out) {
    JpegFile file;
    if (!is_ours(data, length, file)) return false;
    const Box all{0, 0, file.height, file.width};
    if (!decoder_.decode(data, length, file, all, region_)) return false;
    turn_upright(region_, file, out, int64_t(file.upright_width()) * 3);
    return true;
  }

 private:
  static Box box_of(const Batch &batch, int view, int64_t index) {
    const int32_t *box = batch.boxes + (view * batch.count + index) * 4;
    return {box[0], box[1], box[2], box[3]};
  }

  static Box united(const Box &one, const Box &two) {
    const int top = std::min(one.top, two.top), left = std::min(one.left, two.left);
    return {top, left, std::max(one.top + one.height, two.top + two.height) - top,
            std::max(one.left + one.width, two.left + two.width) - left};
  }

  Decoder decoder_;
  Resampler resampler_;
  Region region_;
  std::vector<uint8_t> upright_;
};

// Run `work(worker, index)` for every index, by this thread and others; done[index] says how it went.
template <typename Work>
void each(int64_t count, int num_threads, bool vectors, uint8_t *done, const Work &work) {
  std::atomic<int64_t> next{0};
  auto run = [&]() {
    try {
      Worker worker(vectors);
      for (int64_t index; (index = next.fetch_add(1)) < count;) {
        try {
          done[index] = work(worker, index) ? 1 : 0;
        } catch (const std::exception &) {
          done[index] = 0;  // no memory
        }
      }
    } catch (const std::exception &) {
    }
  };
  std::vector<std::thread> threads;
  try {
    for (int64_t slot = 1; slot < std::min<int64_t>(num_threads, count); ++slot) threads.emplace_back(run);
  } catch (const std::exception &) {
    // Fewer threads than asked for: the ones there are do the work.
  }
  run();
  for (std::thread &thread : threads) thread.join();
}

template <typename Function>
bool find(void *handle, const char *name, Function &function) {
  void *address = dlsym(handle, name);
  std::memcpy(&function, &address, sizeof function);
  return address != nullptr;
}

}  // namespace
}  // namespace declip

extern "C" {

// Open a libjpeg. 0: it serves; 1: it cannot be opened; 2: it lacks a function; 3: it refuses our
// layout of its structures.
int declip_open(const char *path) {
  using namespace declip;
  void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return 1;
  const bool complete = find(handle, "jpeg_std_error", library.standard_errors) &&
                        find(handle, "jpeg_CreateDecompress", library.create) &&
                        find(handle, "jpeg_destroy_decompress", library.destroy) &&
                        find(handle, "jpeg_mem_src", library.from_memory) &&
                        find(handle, "jpeg_read_header", library.read_header) &&
                        find(handle, "jpeg_start_decompress", library.start) &&
                        find(handle, "jpeg_read_scanlines", library.read_rows) &&
                        find(handle, "jpeg_skip_scanlines", library.skip_rows) &&
                        find(handle, "jpeg_crop_scanline", library.crop_columns);
  if (!complete) return 2;
  is_open = Decoder().usable();
  return is_open ? 0 : 3;
}

int declip_has_vectors() {
#ifdef DECLIP_VECTORS
  return __builtin_cpu_supports("avx2") ? 1 : 0;
#else
  return 0;
#endif
}

// Upright height and width of each picture into sizes (count x 2); done[i] is 0 where the file is
// not plain, and nothing is written.
void declip_sizes(const uint8_t *const *data, const int64_t *lengths, int64_t count, int32_t *sizes, uint8_t *done) {
  using namespace declip;
  for (int64_t index = 0; index < count; ++index) {
    JpegFile file;
    done[index] = read_jpeg(data[index], lengths[index], file) && int64_t(file.height) * file.width <= kMaxPixels;
    if (done[index] == 0) continue;
    sizes[index * 2] = file.upright_height();
    sizes[index * 2 + 1] = file.upright_width();
  }
}

// Views of each picture; done[i] is 0 where the picture is left to the Python way.
void declip_views(const uint8_t *const *data, const int64_t *lengths, int64_t count, int views, const int32_t *boxes,
                  const uint8_t *flips, int size, uint8_t *out, int num_threads, int vectors, uint8_t *done) {
  using namespace declip;
  if (!is_open) return;
  const Batch batch{data, lengths, count, views, boxes, flips, size, out, done};
  each(count, num_threads, vectors != 0, done,
       [&](Worker &worker, int64_t index) { return worker.views(batch, index); });
}

// The middle of each picture into out (count x size x size x 3); done[i] as in declip_views.
void declip_center_views(const uint8_t *const *data, const int64_t *lengths, int64_t count, int size, uint8_t *out,
                         int num_threads, int vectors, uint8_t *done) {
  using namespace declip;
  if (!is_open) return;
  each(count, num_threads, vectors != 0, done, [&](Worker &worker, int64_t index) {
    return worker.center_view(data[index], lengths[index], size, out + index * size * size * 3);
  });
}

// Views' bytes by tables (3 x 256), each channel its own, as planes: view sources[i] of `pixels` x 3
// bytes becomes 3 x `pixels` numbers at targets[i].
void declip_planes(const uint8_t *views, const int64_t *sources, int64_t count, int64_t pixels, const float *tables,
                   float *out, const int64_t *targets) {
  const float *const reds = tables, *const greens = tables + 256, *const blues = tables + 512;
  for (int64_t index = 0; index < count; ++index) {
    const uint8_t *view = views + sources[index] * pixels * 3;
    float *red = out + targets[index] * pixels * 3, *green = red + pixels, *blue = green + pixels;
    for (int64_t pixel = 0; pixel < pixels; ++pixel, view += 3) {
      red[pixel] = reds[view[0]];
      green[pixel] = greens[view[1]];
      blue[pixel] = blues[view[2]];
    }
  }
}

// Whole pictures, each into out[i] of the size that declip_sizes says; null ones are left out.
void declip_pictures(const uint8_t *const *data, const int64_t *lengths, int64_t count, uint8_t *const *out,
                     int num_threads, uint8_t *done) {
  using namespace declip;
  if (!is_open) return;
  each(count, num_threads, false, done, [&](Worker &worker, int64_t index) {
    return out[index] != nullptr && worker.picture(data[index], lengths[index], out[index]);
  });
}

// Views of a decoded picture (height x width x 3); the boxes lie in it. False for lack of memory.
int declip_resize(const uint8_t *picture, int height, int width, int views, const int32_t *boxes, const uint8_t *flips,
                  int size, uint8_t *out, int vectors) {
  using namespace declip;
  try {
    Resampler resampler(vectors != 0);
    const int64_t stride = int64_t(width) * 3;
    for (int view = 0; view < views; ++view) {
      const int32_t *box = boxes + view * 4;
      const uint8_t *start = picture + box[0] * stride + int64_t(box[1]) * 3;
      resampler.view({start, stride, box[2], box[3], picture + height * stride}, size, flips[view] != 0,
                     out + int64_t(view) * size * size * 3);
    }
  } catch (const std::exception &) {
    return 0;
  }
  return 1;
}

}  // extern "C"
