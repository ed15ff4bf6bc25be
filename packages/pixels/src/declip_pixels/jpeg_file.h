// What a JPEG's markers say, read without decoding it: size, orientation, and whether the file is of
// the plain kind that the compiled way takes. Codes and layouts are those of ITU-T T.81 (JPEG),
// T.871 (JFIF) and CIPA DC-008 (Exif). Whatever is unusual is not plain, and Pillow's to judge.
#pragma once

#include <cstdint>
#include <cstring>

namespace declip {

struct JpegFile {
  int height = 0, width = 0;  // as stored, before any turning
  int orientation = 1;        // EXIF's 1 to 8
  int components = 0;
  bool one_scan = false;    // baseline or extended, all components in one scan
  int64_t entropy = 0;      // where the first scan's coded data begin
  bool turned() const { return orientation >= 5; }
  int upright_height() const { return turned() ? width : height; }
  int upright_width() const { return turned() ? height : width; }
};

inline int big16(const uint8_t *at) { return at[0] << 8 | at[1]; }

// EXIF's orientation in a TIFF header's first directory; 0 for anything unusual.
inline int exif_orientation(const uint8_t *tiff, int64_t length) {
  if (length < 10) return 0;
  const bool little = std::memcmp(tiff, "II*\0", 4) == 0;
  if (!little && std::memcmp(tiff, "MM\0*", 4) != 0) return 0;
  auto word = [&](int64_t at) {
    return little ? tiff[at] | tiff[at + 1] << 8 : tiff[at] << 8 | tiff[at + 1];
  };
  auto quad = [&](int64_t at) {
    const int64_t one = word(at), two = word(at + 2);
    return little ? one | two << 16 : one << 16 | two;
  };
  const int64_t directory = quad(4);
  if (directory < 8 || directory + 2 > length) return 0;
  const int count = word(directory);
  if (directory + 2 + 12 * int64_t(count) > length) return 0;
  constexpr int kSizes[] = {0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8};  // of the types' values
  int orientation = 1, found = 0;
  for (int entry = 0; entry < count; ++entry) {
    const int64_t at = directory + 2 + 12 * int64_t(entry);
    const int type = word(at + 2);
    if (type < 1 || type > 12) return 0;
    // A parser stops at a value that is not all there, and may have met the orientation or not.
    const int64_t bytes = quad(at + 4) * kSizes[type];
    if (bytes > 4 && quad(at + 8) + bytes > length) return 0;
    if (word(at) != 0x0112) continue;
    orientation = word(at + 8);
    if (++found > 1 || type != 3 || quad(at + 4) != 1) return 0;
  }
  return orientation >= 1 && orientation <= 8 ? orientation : 0;
}

inline bool contains(const uint8_t *data, int64_t length, const char *text) {
  const int64_t size = int64_t(std::strlen(text));
  for (const uint8_t *at = data; length >= size;) {
    const auto *hit = static_cast<const uint8_t *>(std::memchr(at, text[0], size_t(length - size + 1)));
    if (hit == nullptr) return false;
    if (std::memcmp(hit, text, size_t(size)) == 0) return true;
    length -= hit + 1 - at;
    at = hit + 1;
  }
  return false;
}

// The frame header: 8 bits, gray or three components, chroma halved or not.
inline bool read_frame(const uint8_t *body, int64_t length, JpegFile &file) {
  if (length < 6 || file.components != 0 || body[0] != 8) return false;
  file.height = big16(body + 1);
  file.width = big16(body + 3);
  file.components = body[5];
  if (file.height == 0 || file.width == 0 || length != 6 + 3 * file.components) return false;
  if (file.components == 1) return body[7] == 0x11;
  if (file.components != 3 || body[10] != 0x11 || body[13] != 0x11) return false;
  return body[7] == 0x11 || body[7] == 0x21 || body[7] == 0x12 || body[7] == 0x22;
}

// Quantization tables, each of 64 values of one or two bytes.
inline bool read_tables(const uint8_t *body, int64_t length) {
  int64_t at = 0;
  while (at < length) {
    if ((body[at] & 15) > 3 || body[at] >> 4 > 1) return false;
    at += body[at] >> 4 == 1 ? 129 : 65;
  }
  return at == length;
}

// One segment before the first scan; false where it makes the file unusual.
inline bool read_segment(int code, const uint8_t *body, int64_t length, JpegFile &file, int &exifs) {
  if (code == 0xC0 || code == 0xC1 || code == 0xC2) {
    file.one_scan = code != 0xC2;
    return read_frame(body, length, file);
  }
  if (code == 0xE1 && length >= 6 && std::memcmp(body, "Exif\0\0", 6) == 0) {
    file.orientation = exif_orientation(body + 6, length - 6);
    return ++exifs == 1 && file.orientation != 0;
  }
  // XMP counts where EXIF is silent, and finding that out is a parser's work.
  if (code == 0xE1) return !contains(body, length, "tiff:Orientation");
  // Several pictures in one file: Pillow opens those by another of its readers.
  if (code == 0xE2) return !(length >= 4 && std::memcmp(body, "MPF\0", 4) == 0);
  if (code == 0xDB) return read_tables(body, length);
  return code == 0xC4 || code == 0xDD || code == 0xFE || (code >= 0xE0 && code <= 0xEF);
}

// Read the markers up to the first scan's data; false where the file is not plain.
inline bool read_jpeg(const uint8_t *data, int64_t length, JpegFile &file) {
  if (length < 4 || data[0] != 0xFF || data[1] != 0xD8) return false;
  int exifs = 0;
  for (int64_t at = 2; at + 4 <= length;) {
    if (data[at] != 0xFF) return false;
    const int code = data[at + 1];
    const int64_t end = at + 2 + big16(data + at + 2);
    if (end < at + 4 || end > length) return false;
    if (code == 0xDA) {
      if (file.components == 0 || end < at + 5) return false;
      file.one_scan = file.one_scan && data[at + 4] == file.components;
      file.entropy = end;
      return true;
    }
    if (!read_segment(code, data + at + 4, end - at - 4, file, exifs)) return false;
    at = end;
  }
  return false;
}

// Whether a scan's coded data run to the picture's end with no marker but restarts. A decoder that
// stops below the last row it needs would not see a file that is cut off or goes on otherwise.
inline bool is_whole(const uint8_t *data, int64_t length, int64_t entropy) {
  const uint8_t *at = data + entropy, *end = data + length;
  while ((at = static_cast<const uint8_t *>(std::memchr(at, 0xFF, size_t(end - at)))) != nullptr) {
    if (at + 1 >= end) return false;
    if (at[1] == 0xD9) return true;
    if (at[1] != 0 && (at[1] < 0xD0 || at[1] > 0xD7)) return false;
    at += 2;
  }
  return false;
}

}  // namespace declip
