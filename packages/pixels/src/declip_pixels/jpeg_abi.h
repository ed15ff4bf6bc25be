// The binary interface of libjpeg's decompressor, version 62, as libjpeg-turbo offers it: layouts
// and numbers only, so that no header of the library is needed to compile. The library itself
// judges them: jpeg_CreateDecompress is told this version and this size, and refuses others.
#pragma once

#include <cstddef>

namespace declip {

constexpr int kJpegVersion = 62;
constexpr int kGray = 1, kRgb = 2, kYcbcr = 3;  // color spaces

struct JpegErrors;

struct JpegState {  // what every object begins with
  JpegErrors *errors;
  void *memory;
  void *progress;
  void *client;
  int is_decompressor;
  int global_state;
};

struct JpegErrors {
  void (*fail)(JpegState *);
  void (*message)(JpegState *, int level);  // level -1: the data are damaged
  void (*print)(JpegState *);
  void (*format)(JpegState *, char *);
  void (*reset)(JpegState *);
  int code;
  union {
    int numbers[8];
    char text[80];
  } parameters;
  int trace_level;
  long warnings;
  const char *const *messages;
  int last_message;
  const char *const *more_messages;
  int first_more, last_more;
};

struct JpegDecompressor : JpegState {
  void *source;
  unsigned int image_width, image_height;
  int num_components;
  int jpeg_color_space, out_color_space;
  unsigned int scale_num, scale_denom;
  double output_gamma;
  int buffered_image, raw_data_out;
  int dct_method, fancy_upsampling, block_smoothing;
  int quantize_colors, dither_mode, two_pass_quantize, desired_colors;
  int enable_1pass, enable_external, enable_2pass;
  unsigned int output_width, output_height;
  int out_color_components, output_components, recommended_rows;
  int actual_colors;
  unsigned char **colormap;
  unsigned int output_scanline;
  int input_scan;
  unsigned int input_mcu_row;
  int output_scan;
  unsigned int output_mcu_row;
  int (*coefficient_bits)[64];
  void *quantization_tables[4];
  void *dc_tables[4], *ac_tables[4];
  int precision;
  void *components;
  int progressive, arithmetic;
  unsigned char arithmetic_dc_low[16], arithmetic_dc_up[16], arithmetic_ac[16];
  unsigned int restart_interval;
  int saw_jfif;
  unsigned char jfif_major, jfif_minor, density_unit;
  unsigned short density_x, density_y;
  int saw_adobe;
  unsigned char adobe_transform;
  int cosited;
  void *markers;
  int max_horizontal, max_vertical, min_scaled_size;
  unsigned int mcu_rows;
  unsigned char *range_limit;
  int scan_components;
  void *scan_component[4];
  unsigned int mcus_a_row, mcu_rows_in_scan;
  int blocks_in_mcu, mcu_membership[10];
  int spectral_start, spectral_end, approximation_high, approximation_low;
  int unread_marker;
  void *modules[11];
};

}  // namespace declip
