// The resampling law of resampling.py, in integers: see there for what is computed. A vector of
// AVX2 and a plain loop give the same sums, since every sum is exact.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define DECLIP_VECTORS 1
#define DECLIP_AVX2 __attribute__((target("avx2")))
#endif

namespace declip {

constexpr int kWeightBits = 14, kMiddleBits = 7;
constexpr int kColumnShift = kWeightBits - kMiddleBits, kRowShift = kWeightBits + kMiddleBits;
constexpr int kMiddleMax = 255 << kMiddleBits;
constexpr int kOverread = 64;  // bytes behind a row that vectors may touch

// Some of the outputs that `length` pixels become, and those of the pixels that they take.
struct Axis {
  int length;     // of the whole picture
  int64_t total;  // outputs of the whole picture
  int64_t start;  // first of the outputs that are asked for
  int begin, end;  // pixels from where on, and up to where, the outputs take any

  double scale() const { return double(length) / double(total); }
  double reach() const { return 2.0 * std::max(scale(), 1.0); }
  double center(int output) const { return (double(start + output) + 0.5) * scale(); }
  int first_of(int output) const { return std::max(int(center(output) - reach() + 0.5), 0); }
  int end_of(int output) const { return std::min(int(center(output) + reach() + 0.5), length); }

  static Axis whole(int length, int size) { return {length, size, 0, 0, length}; }

  // `size` outputs in the middle of those that a side becomes when the shorter one, maybe another,
  // becomes `size`: center_window of resampling.py.
  static Axis middle(int length, int shorter, int size) {
    const int64_t total = int64_t(double(int64_t(size) * length) / double(shorter));
    const int64_t beside = total - size;
    Axis axis{length, total, beside / 2, 0, 0};
    if (beside % 2 == 1) axis.start += axis.start % 2;  // half to even
    axis.begin = axis.first_of(0);
    axis.end = axis.end_of(size - 1);
    return axis;
  }
};

struct Weights {
  int taps = 0;  // of every output, the last ones 0
  std::vector<int32_t> first;   // from the axis's `begin` on
  std::vector<int16_t> values;  // size x taps

  static double cubic(double distance) {
    if (distance < 1.0) return (1.5 * distance - 2.5) * distance * distance + 1.0;
    if (distance < 2.0) return ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0;
    return 0.0;
  }

  static double rounded(double value) {
    constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52: what is below 1 falls off, half to even
    return (value + magic) - magic;
  }

  // Weights of `size` outputs, the last output first if mirrored; taps are filled up to a multiple
  // of `together`.
  void make(const Axis &axis, int size, bool mirrored, int together) {
    const double stretch = std::max(axis.scale(), 1.0);
    first.resize(size_t(size));
    end_.resize(size_t(size));
    taps = 0;
    for (int output = 0; output < size; ++output) {
      const int slot = mirrored ? size - 1 - output : output;
      first[size_t(slot)] = axis.first_of(output) - axis.begin;
      end_[size_t(slot)] = axis.end_of(output) - axis.begin;
      taps = std::max(taps, end_[size_t(slot)] - first[size_t(slot)]);
    }
    taps = (taps + together - 1) / together * together;
    values.assign(size_t(size) * size_t(taps), 0);
    running_.resize(size_t(taps));
    for (int output = 0; output < size; ++output) {
      const double center = axis.center(output);
      const int slot = mirrored ? size - 1 - output : output;
      const int begin = first[size_t(slot)], end = end_[size_t(slot)];
      double sum = 0.0;
      for (int place = begin; place < end; ++place) {
        sum += cubic(std::fabs((axis.begin + place + 0.5 - center) / stretch));
        running_[size_t(place - begin)] = sum;
      }
      int16_t *target = values.data() + size_t(slot) * size_t(taps);
      double before = 0.0;
      for (int tap = 0; tap < end - begin; ++tap) {
        const double now = rounded(running_[size_t(tap)] / sum * double(1 << kWeightBits));
        target[tap] = int16_t(now - before);
        before = now;
      }
    }
  }

 private:
  std::vector<int32_t> end_;
  std::vector<double> running_;
};

// A picture in memory: rows of RGB, and where what may be read ends.
struct Pixels {
  const uint8_t *start;
  int64_t stride;
  int height, width;
  const uint8_t *limit;
};

class Resampler {
 public:
  explicit Resampler(bool vectors) : vectors_(vectors) {}

  // One view (size x size x 3) of a whole picture.
  void view(const Pixels &picture, int size, bool mirrored, uint8_t *out) {
    view(picture, Axis::whole(picture.height, size), Axis::whole(picture.width, size), size, mirrored, out);
  }

  // The same of a part of a picture: the pixels from `begin` to `end` of both axes.
  void view(const Pixels &picture, const Axis &rows, const Axis &columns, int size, bool mirrored, uint8_t *out) {
    columns_.make(columns, size, mirrored, 4);
    rows_.make(rows, size, false, 2);
    values_ = size * 3;
    stride_ = ((values_ + 31) & ~31) + 16;
    middle_.resize(size_t(stride_) * size_t(picture.height) + 32);
#ifdef DECLIP_VECTORS
    if (vectors_) {
      spread_weights(size);
      padded_.resize(4 * (size_t(picture.width + columns_.taps) * 3 + kOverread));
      // Loops of a known length are unrolled: those of views that are shrunk by less than four.
      switch (columns_.taps / 4) {
        case 2: columns_by_vectors<2>(picture, size); break;
        case 3: columns_by_vectors<3>(picture, size); break;
        case 4: columns_by_vectors<4>(picture, size); break;
        default: columns_by_vectors<0>(picture, size);
      }
      rows_by_vectors(picture.height, size, out);
      return;
    }
#endif
    columns_by_loops(picture, size);
    rows_by_loops(picture.height, size, out);
  }

 private:
  void columns_by_loops(const Pixels &picture, int size) {
    for (int row = 0; row < picture.height; ++row) {
      const uint8_t *pixels = picture.start + row * picture.stride;
      int16_t *target = middle_.data() + size_t(row) * size_t(stride_);
      for (int output = 0; output < size; ++output) {
        const int begin = columns_.first[size_t(output)];
        const int taps = std::min(columns_.taps, picture.width - begin);
        const int16_t *weights = columns_.values.data() + size_t(output) * size_t(columns_.taps);
        for (int channel = 0; channel < 3; ++channel) {
          int32_t sum = 1 << (kColumnShift - 1);
          for (int tap = 0; tap < taps; ++tap) sum += weights[tap] * pixels[(begin + tap) * 3 + channel];
          target[output * 3 + channel] = int16_t(std::clamp(sum >> kColumnShift, 0, kMiddleMax));
        }
      }
    }
  }

  void rows_by_loops(int height, int size, uint8_t *out) {
    for (int output = 0; output < size; ++output) {
      const int begin = rows_.first[size_t(output)];
      const int taps = std::min(rows_.taps, height - begin);
      const int16_t *weights = rows_.values.data() + size_t(output) * size_t(rows_.taps);
      for (int value = 0; value < values_; ++value) {
        int32_t sum = 1 << (kRowShift - 1);
        for (int tap = 0; tap < taps; ++tap)
          sum += weights[tap] * middle_[size_t(begin + tap) * size_t(stride_) + size_t(value)];
        out[int64_t(output) * values_ + value] = uint8_t(std::clamp(sum >> kRowShift, 0, 255));
      }
    }
  }

#ifdef DECLIP_VECTORS
  // Four taps as a vector meets them: a b a b a b 0 0 in one half, c d c d c d 0 0 in the other.
  void spread_weights(int size) {
    const int groups = columns_.taps / 4;
    spread_.assign(size_t(size) * size_t(groups) * 16, 0);
    for (int64_t group = 0; group < int64_t(size) * groups; ++group) {
      const int16_t *weights = columns_.values.data() + group * 4;
      int16_t *target = spread_.data() + group * 16;
      for (int place = 0; place < 6; ++place) {
        target[place] = weights[place & 1];
        target[place + 8] = weights[2 + (place & 1)];
      }
    }
  }

  // A row that may be read past its end: itself, or a copy.
  const uint8_t *readable(const Pixels &picture, int row, int slot) {
    const uint8_t *pixels = picture.start + row * picture.stride;
    const int64_t touched = int64_t(picture.width + columns_.taps) * 3 + kOverread;
    if (pixels + touched <= picture.limit) return pixels;
    uint8_t *copy = padded_.data() + slot * touched;
    std::memcpy(copy, pixels, size_t(picture.width) * 3);
    return copy;
  }

  template <int kGroups>
  DECLIP_AVX2 void columns_by_vectors(const Pixels &picture, int size) {
    const __m256i order = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,  //
                                           6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
    const __m256i half = _mm256_set1_epi32(1 << (kColumnShift - 1));
    const __m256i most = _mm256_set1_epi16(kMiddleMax), none = _mm256_setzero_si256();
    const int groups = kGroups == 0 ? columns_.taps / 4 : kGroups;
    for (int row = 0; row < picture.height; row += 4) {
      int16_t *target[4];
      const uint8_t *pixels[4];
      rows_from(picture, row, pixels, target);
      const int16_t *weights = spread_.data();
      for (int output = 0; output < size; ++output) {
        int64_t at = int64_t(columns_.first[size_t(output)]) * 3;
        __m256i one = none, two = none, three = none, four = none;
        for (int group = 0; group < groups; ++group, at += 12, weights += 16) {
          const __m256i weight = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(weights));
          one = _mm256_add_epi32(one, product(pixels[0] + at, order, weight));
          two = _mm256_add_epi32(two, product(pixels[1] + at, order, weight));
          three = _mm256_add_epi32(three, product(pixels[2] + at, order, weight));
          four = _mm256_add_epi32(four, product(pixels[3] + at, order, weight));
        }
        const __m256i upper = _mm256_srai_epi32(_mm256_add_epi32(halves(one, two), half), kColumnShift);
        const __m256i lower = _mm256_srai_epi32(_mm256_add_epi32(halves(three, four), half), kColumnShift);
        __m256i values = _mm256_packs_epi32(upper, lower);
        values = _mm256_max_epi16(_mm256_min_epi16(values, most), none);
        // Eight bytes for six: the next output writes over the two behind.
        const __m128i left = _mm256_castsi256_si128(values), right = _mm256_extracti128_si256(values, 1);
        const int64_t place = int64_t(output) * 3;
        _mm_storel_epi64(reinterpret_cast<__m128i *>(target[0] + place), left);
        _mm_storel_epi64(reinterpret_cast<__m128i *>(target[1] + place), right);
        _mm_storel_epi64(reinterpret_cast<__m128i *>(target[2] + place), _mm_unpackhi_epi64(left, left));
        _mm_storel_epi64(reinterpret_cast<__m128i *>(target[3] + place), _mm_unpackhi_epi64(right, right));
      }
    }
  }

  // Four rows, and where their outputs go. Rows beyond the last one repeat it: the same numbers are
  // written to it again.
  void rows_from(const Pixels &picture, int row, const uint8_t *pixels[4], int16_t *target[4]) {
    for (int slot = 0; slot < 4; ++slot) {
      const int of = std::min(row + slot, picture.height - 1);
      pixels[slot] = readable(picture, of, slot);
      target[slot] = middle_.data() + size_t(of) * size_t(stride_);
    }
  }

  DECLIP_AVX2 static __m256i product(const uint8_t *pixels, __m256i order, __m256i weight) {
    const __m128i loaded = _mm_loadu_si128(reinterpret_cast<const __m128i *>(pixels));
    return _mm256_madd_epi16(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(loaded), order), weight);
  }

  // The halves of one vector added up, and those of another.
  DECLIP_AVX2 static __m256i halves(__m256i one, __m256i two) {
    return _mm256_add_epi32(_mm256_permute2x128_si256(one, two, 0x20),
                            _mm256_permute2x128_si256(one, two, 0x31));
  }

  DECLIP_AVX2 void rows_by_vectors(int height, int size, uint8_t *out) {
    const __m256i half = _mm256_set1_epi32(1 << (kRowShift - 1));
    alignas(32) uint8_t tail[32];
    for (int output = 0; output < size; ++output) {
      const int begin = rows_.first[size_t(output)];
      const int16_t *weights = rows_.values.data() + size_t(output) * size_t(rows_.taps);
      for (int value = 0; value < values_; value += 32) {
        __m256i sums[4] = {half, half, half, half};
        for (int tap = 0; tap < rows_.taps; tap += 2) {
          int32_t pair;
          std::memcpy(&pair, weights + tap, sizeof pair);
          const __m256i weight = _mm256_set1_epi32(pair);
          const int16_t *upper = middle_row(begin + tap, height) + value;
          const int16_t *lower = middle_row(begin + tap + 1, height) + value;
          for (int part = 0; part < 2; ++part) {
            const __m256i above = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(upper + part * 16));
            const __m256i below = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(lower + part * 16));
            __m256i &low = sums[part * 2], &high = sums[part * 2 + 1];
            low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_unpacklo_epi16(above, below), weight));
            high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_unpackhi_epi16(above, below), weight));
          }
        }
        for (__m256i &sum : sums) sum = _mm256_srai_epi32(sum, kRowShift);
        const __m256i bytes = _mm256_permute4x64_epi64(
            _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3])),
            0xD8);
        uint8_t *target = out + int64_t(output) * values_ + value;
        if (value + 32 <= values_) {
          _mm256_storeu_si256(reinterpret_cast<__m256i *>(target), bytes);
        } else {
          _mm256_store_si256(reinterpret_cast<__m256i *>(tail), bytes);
          std::memcpy(target, tail, size_t(values_ - value));
        }
      }
    }
  }

  // Rows beyond the last one have weight 0.
  const int16_t *middle_row(int row, int height) const {
    return middle_.data() + size_t(std::min(row, height - 1)) * size_t(stride_);
  }
#endif

  bool vectors_;
  Weights columns_, rows_;
  std::vector<int16_t> spread_, middle_;  // middle: height x stride, in 1/128
  std::vector<uint8_t> padded_;
  int values_ = 0, stride_ = 0;
};

}  // namespace declip
