// Values of a row of logits on a set of ids, and the log of the rest's mass. No torch here.
#pragma once

#include <vector>

#include "rows.h"

namespace tdkd {

struct Slot {
  int32_t id, slot;
  friend bool operator<(Slot a, Slot b) { return a.id != b.id ? a.id < b.id : a.slot < b.slot; }
};

}  // namespace tdkd

#define TDKD_BODY "student_rows_row.h"
#include "every_isa.h"
