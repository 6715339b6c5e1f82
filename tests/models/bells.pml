/* Bells (docs/protocol.md): nobody sleeps while there is something to do.
 *
 * Worker and engine exchange sweep after sweep: published, submitted, done. Each spins for as long as it likes, parks
 * and is rung, as dataplane.cpp, dataplane_channel.cpp (wait_until, revoke, abort) and worker.cpp (park, stop) do it.
 *
 * A store waits in its process's store buffer until the process `Memory` takes it: what the fences are for. Of three
 * kinds of memory order (relaxed, release, sequentially consistent) that is what a TSO machine leaves; loads are not
 * reordered with each other. A futex wait compares under the kernel's lock, with the buffer drained.
 *
 * One `plan` is drawn per run: nothing happens, the service stops its worker, the worker is killed, the engine's other
 * thread interrupts, or a device submits. Waits have no time limit here: a lost wake-up is a deadlock.
 */
#define WORKER 0
#define ENGINE 1
#define OTHER 2 /* the engine's keeper thread, or the service's event loop */
#define DEVICE 3

mtype = { NOTHING, STOP, KILL, INTERRUPT, BY_DEVICE };
mtype plan;

#define PUBLISHED 0
#define SUBMITTED 1
#define DONE 2
#define WORKER_PARKED 3
#define ENGINE_PARKED 4
#define REVOKED 5
#define STOPPED 6 /* ControlHeader::state */
#define CELLS 7
byte memory[CELLS];

bool buffered[4];
byte buffered_cell[4], buffered_value[4];

/* What only read-modify-writes or sequentially consistent stores touch. A bell is a 32-bit counter of which a wait needs
 * to know one thing, whether it has been rung since it was looked at. */
bool rung[2], asleep[2];
bool stop, aborted, killed;

#define SEEN(by, cell) (buffered[by] && buffered_cell[by] == cell -> buffered_value[by] : memory[cell])
#define STORE(by, cell, value) \
  atomic { !buffered[by] -> buffered[by] = true; buffered_cell[by] = cell; buffered_value[by] = value }
#define FENCE(by) !buffered[by]
#define RING(by, whose) atomic { !buffered[by] -> rung[whose] = true }
#define WAKE(whose) asleep[whose] = false
#define REACHED(value, sweep) ((value - sweep + 8) % 4 < 2)

inline drain(by) {
  d_step {
    buffered[by] -> memory[buffered_cell[by]] = buffered_value[by];
    buffered[by] = false; buffered_cell[by] = 0; buffered_value[by] = 0
  }
}

proctype Memory() {
end:
  do
  :: drain(0)
  :: drain(1)
  :: drain(2)
  :: drain(3)
  od
}

inline ring_if_parked(by, parked, whose) {
  FENCE(by);
  if
  :: SEEN(by, parked) -> RING(by, whose); WAKE(whose)
  :: else
  fi
}

inline futex_wait(by) {
  atomic {
    !buffered[by];
    if
    :: !rung[by] -> asleep[by] = true
    :: else
    fi
  }
  !asleep[by]
}

#define STOPPING (stop || SEEN(WORKER, REVOKED))
#define HAS_WORK (loaded -> REACHED(SEEN(WORKER, SUBMITTED), sweep) : REACHED(SEEN(WORKER, PUBLISHED), sweep))

proctype Worker() {
  byte sweep = 1;
  bool loaded = false;
  {
    do
    :: STOPPING -> break
    :: else ->
      if
      :: HAS_WORK ->
        if
        :: !loaded -> loaded = true
        :: else -> STORE(WORKER, DONE, sweep); ring_if_parked(WORKER, ENGINE_PARKED, ENGINE); loaded = false;
          sweep = (sweep + 1) % 4
        fi
      :: else ->
        if
        :: true /* spins on */
        :: !(loaded && plan == BY_DEVICE) -> /* must_not_park */
          rung[WORKER] = false; /* observed */
          STORE(WORKER, WORKER_PARKED, 1);
          FENCE(WORKER); /* park */
          if
          :: !STOPPING && !HAS_WORK -> futex_wait(WORKER)
          :: else
          fi;
          STORE(WORKER, WORKER_PARKED, 0)
        fi
      fi
    od;
    STORE(WORKER, STOPPED, 1); FENCE(WORKER);
    ring_if_parked(WORKER, ENGINE_PARKED, ENGINE) /* stopped */
  } unless { killed }
}

#define READY REACHED(SEEN(ENGINE, DONE), sweep)
#define FAILED SEEN(ENGINE, STOPPED)

proctype Engine() {
  byte sweep = 0;
  do
  :: true ->
    sweep = (sweep + 1) % 4;
    STORE(ENGINE, PUBLISHED, sweep);
    ring_if_parked(ENGINE, WORKER_PARKED, WORKER); /* publish */
    if
    :: plan != BY_DEVICE -> STORE(ENGINE, SUBMITTED, sweep); ring_if_parked(ENGINE, WORKER_PARKED, WORKER)
    :: else
    fi;
    do
    :: aborted || FAILED -> goto over
    :: else ->
      if
      :: READY -> break
      :: else ->
        if
        :: true /* spins on */
        :: true ->
          rung[ENGINE] = false; /* observed */
          STORE(ENGINE, ENGINE_PARKED, 1);
          FENCE(ENGINE); /* wait_until */
          if
          :: !READY && !FAILED && !aborted -> futex_wait(ENGINE)
          :: else
          fi;
          STORE(ENGINE, ENGINE_PARKED, 0)
        fi
      fi
    od
  od;
over:
  skip
}

/* Submits a sweep that is published, and rings nobody. */
proctype Device() {
  byte sweep = 1;
end:
  do
  :: REACHED(memory[PUBLISHED], sweep) && !aborted -> STORE(DEVICE, SUBMITTED, sweep); sweep = (sweep + 1) % 4
  od
}

inline interrupt() {
  STORE(OTHER, REVOKED, 1); ring_if_parked(OTHER, WORKER_PARKED, WORKER); /* revoke */
  FENCE(OTHER); aborted = true; RING(OTHER, ENGINE); WAKE(ENGINE) /* abort */
}

proctype Other() {
  if
  :: plan == STOP -> stop = true; RING(OTHER, WORKER); WAKE(WORKER)
  :: plan == KILL -> killed = true; interrupt()
  :: plan == INTERRUPT -> interrupt()
  :: else
  fi
}

init {
  atomic {
    if
    :: plan = NOTHING
    :: plan = STOP
    :: plan = KILL
    :: plan = INTERRUPT
    :: plan = BY_DEVICE
    fi;
    run Memory(); run Worker(); run Engine(); run Other();
    if
    :: plan == BY_DEVICE -> run Device()
    :: else
    fi
  }
}
