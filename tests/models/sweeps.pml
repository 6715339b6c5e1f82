/* Sweeps (docs/protocol.md): no record and no slot is written while the worker may read it, and each result is read
 * where it was meant to be. Without end, so that the counters wrap round: they have 8 values instead of 2^32.
 *
 * Memory is what it says it holds: a record its sweep, a slot the sweep of its q, k, v, and of its o. Whoever reads looks
 * at the start and at the end. The worker's two lanes are processes of their own, which is more than the one thread
 * that takes turns can do. A store that is a release here happens after those before it (bells.pml has the rest).
 *
 * Who submits (dataplane_channel.cpp; pipeline/cuda/host_side.py and kernels/gpu/host_exchange.py for the device):
 *   INLINE     the engine, and it waits for each layer where it left; may end a sweep in the middle
 *   DEFERRED   the engine, and it takes a layer's result in the sweep after, or never
 *   BY_DEVICE  a GPU that is a sweep behind, with depart and arrive in any order; the engine may fail to launch
 *              (out of memory), and then gives the epoch up
 */
#ifndef MODE
#define MODE INLINE
#endif
#define VALUES 8
#define RECORDS 4
#define LANES (MODE == INLINE -> 2 : 1)
#define MOST_LANES 2
#ifndef LAYERS
#define LAYERS 1
#endif
#define FRESHEN 4 /* sweeps between two freshenings; 2^28 of 2^32. Half of VALUES is the most. */
#define BEFORE(n, by) ((n + VALUES - by) % VALUES)
#define REACHED(value, sweep) (BEFORE(value, sweep) < VALUES / 2)
#define FIRST 1

mtype = { INLINE, DEFERRED, BY_DEVICE };
mtype mode;
bool revoked;

byte published = 0, retired[MOST_LANES];
byte submitted[MOST_LANES * LAYERS], done[MOST_LANES * LAYERS];
#define BELL(lane, layer) ((lane) * LAYERS + layer)

byte record_sweep[RECORDS];
bool record_rows[RECORDS * MOST_LANES], record_cancelled[RECORDS];
#define RECORD(n) ((n) % RECORDS)
#define ROWS(n, lane) record_rows[RECORD(n) * MOST_LANES + lane]

byte slot[MOST_LANES * LAYERS * 2], out[MOST_LANES * LAYERS * 2];
#define SLOT(lane, layer, n) (BELL(lane, layer) * 2 + (n) % 2)
#define UNREADABLE 254 /* is being written */
#define USED 255 /* has been read; forgotten, for the number of states */

/* Sweeps launched on the device: two at most. */
chan launch = [2] of { byte, bool, bool };
byte landed = 0;

/* The start and the end of reading. */
inline read(held, n) {
  assert(held == n);
  assert(held == n)
}

proctype Lane(byte lane) {
  byte n = FIRST, layer;
  do
  :: revoked -> break
  :: REACHED(published, n) ->
    read(record_sweep[RECORD(n)], n);
    layer = (ROWS(n, lane) -> 0 : LAYERS);
    do
    :: revoked -> goto over
    :: layer == LAYERS -> break
    :: layer < LAYERS && REACHED(submitted[BELL(lane, layer)], n) ->
      read(slot[SLOT(lane, layer, n)], n);
      d_step { slot[SLOT(lane, layer, n)] = USED; out[SLOT(lane, layer, n)] = n; done[BELL(lane, layer)] = n }
      layer++
    :: layer < LAYERS && record_cancelled[RECORD(n)] && !REACHED(submitted[BELL(lane, layer)], n) -> break
    od;
    atomic {
      assert(record_sweep[RECORD(n)] == n); ROWS(n, lane) = false;
      retired[lane] = n; n = (n + 1) % VALUES; layer = 0
    }
  od;
over:
  skip
}

#define RETIRED(n) (REACHED(retired[0], n) && (LANES == 1 || REACHED(retired[1], n)))

byte at, next; /* the engine's sweep */
byte bell;
bool now[MOST_LANES], before[MOST_LANES]; /* rows in this sweep, and rows of the one before whose results are still wanted */

inline begin_sweep(back) {
  next = (at + 1) % VALUES;
  if
  :: next % FRESHEN == 0 -> RETIRED(at) -> freshen()
  :: else -> RETIRED(BEFORE(next, back))
  fi;
  d_step { at = next; next = 0 };
  record_sweep[RECORD(at)] = UNREADABLE;
  d_step {
    record_cancelled[RECORD(at)] = false; ROWS(at, 0) = now[0]; ROWS(at, 1) = now[1];
    record_sweep[RECORD(at)] = at;
    published = at
  }
}

inline freshen() {
  d_step {
    for (bell : 0 .. MOST_LANES * LAYERS - 1) { submitted[bell] = at; done[bell] = at }
    bell = 0
  }
}

inline fill(lane, layer, n) {
  slot[SLOT(lane, layer, n)] = UNREADABLE;
  d_step { slot[SLOT(lane, layer, n)] = n; submitted[BELL(lane, layer)] = n }
}

inline fetch(lane, layer, n) {
  REACHED(done[BELL(lane, layer)], n);
  read(out[SLOT(lane, layer, n)], n);
  out[SLOT(lane, layer, n)] = USED
}

inline any_rows(lane) {
  if
  :: now[lane] = true
  :: now[lane] = false
  fi
}

proctype Engine() {
  byte layer;
  at = BEFORE(FIRST, 1);
  do
  :: mode == INLINE ->
    any_rows(0); any_rows(1);
    begin_sweep(2); /* kSlots */
    layer = 0;
    do
    :: layer == LAYERS -> break
    :: layer < LAYERS ->
      if
      :: now[0] -> fill(0, layer, at)
      :: else
      fi;
      if
      :: now[1] -> fill(1, layer, at)
      :: else
      fi;
      if
      :: now[0] -> fetch(0, layer, at)
      :: else
      fi;
      if
      :: now[1] -> fetch(1, layer, at)
      :: else
      fi;
      layer++
    :: layer < LAYERS && (now[0] || now[1]) -> /* something failed: cancel_sweep */
      record_cancelled[RECORD(at)] = true;
      RETIRED(at); /* cancelled */
      record_cancelled[RECORD(at)] = false;
      break
    od
  :: mode == DEFERRED ->
    before[0] = now[0]; any_rows(0);
    begin_sweep(2); /* kSlots */
    layer = 0;
    do
    :: layer == LAYERS -> break
    :: layer < LAYERS ->
      if
      :: before[0] -> fetch(0, layer, BEFORE(at, 1))
      :: true /* nobody wants it any more */
      fi;
      if
      :: now[0] -> fill(0, layer, at)
      :: else
      fi;
      layer++
    od
  :: mode == BY_DEVICE ->
    before[0] = now[0]; any_rows(0);
    begin_sweep(RECORDS); /* kRingRecords */
    if
    :: launch!at, now[0], before[0];
      REACHED(landed, BEFORE(at, 1)) /* the result of the one before is taken, this one runs */
    :: true -> /* out of memory */
      now[0] = false;
      revoked = true; break /* give_up */
    fi
  od
}

/* Depart and ring on one branch of the graph, arrive on another. */
proctype Device() {
  byte n, layer;
  bool leave, come, left, came;
end:
  do
  :: launch?n, leave, come ->
    layer = 0;
    do
    :: layer == LAYERS -> break
    :: layer < LAYERS ->
      left = false; came = false;
      do
      :: left && came -> break
      :: !left ->
        if
        :: leave -> fill(0, layer, n)
        :: else -> submitted[BELL(0, layer)] = n /* rings, whoever leaves */
        fi;
        left = true
      :: !came ->
        if
        :: come && !revoked -> REACHED(done[BELL(0, layer)], BEFORE(n, 1)) || revoked;
          if
          :: REACHED(done[BELL(0, layer)], BEFORE(n, 1)) -> fetch(0, layer, BEFORE(n, 1))
          :: else
          fi
        :: else
        fi;
        came = true
      od;
      layer++
    od;
    atomic { landed = n; layer = 0; left = false; came = false; leave = false; come = false }
  od
}

init {
  atomic {
    mode = MODE;
    run Lane(0); run Engine();
    if
    :: LANES == 2 -> run Lane(1)
    :: else
    fi;
    if
    :: mode == BY_DEVICE -> run Device()
    :: else
    fi
  }
}
