/* Sessions (docs/protocol.md): lease, tether and resume while a cpu_service is stopped, continued, killed, started again,
 * or replaced while it stands still, links break, either side is late, and the engine dies.
 *
 * Each epoch has a worker, a tether with two ends, and a pool. A worker writes (appends K and V) for a
 * sweep that was published; a sweep is `stale` when the engine has used its blocks for something else since.
 * Time does not pass: whatever a clock could bring (a lease's end on either side, a missed deadline, silence) can happen
 * at any moment in which it is not excluded by the other side's answering. FAULTS bounds how many there are.
 *
 * shm transport; gpu_service/offload/keeper.py, session_tier.py, shm_tier.py; cpu_service/sessions.py, shm_epoch.py.
 */
#ifndef FAULTS
#define FAULTS 2
#endif
#ifndef LAST
#define LAST 3 /* the last epoch that is tried */
#endif
#define EPOCHS 6 /* number 0 is none */
#define POOLS 3
#define SERVICES 2
#define NONE 0

mtype = { ABSENT, LIVE, STILL, DEAD }; /* a service's process */
mtype = { IDLE, WRITING, ENDED }; /* a worker; 0: not started */
mtype = { UP, DEGRADED, LOST };

byte faults = FAULTS;
mtype service[SERVICES];
#define IDS POOLS
byte session[SERVICES * IDS]; /* by session id: its epoch, NONE: there is none */
byte dead_engine, used;

/* By epoch. */
mtype worker[EPOCHS];
byte home[EPOCHS], id_of[EPOCHS], pool_of[EPOCHS];
bool told_to_stop[EPOCHS];
bool revoked[EPOCHS]; /* and aborted: the engine's waits end */
bool published[EPOCHS]; /* a sweep that the worker has not done */
bool stale[EPOCHS]; /* its blocks have been used for something else since */
bool engines_end[EPOCHS], services_end[EPOCHS]; /* of the tether; true: open */

byte pools = 1; /* the next one */

/* The engine. */
bool alive = true, tired; /* tired: all epochs of the model are used up */
byte epoch = NONE; /* the last one that was tried */
byte id; /* of the session: a new one after each loss */
byte pool = NONE; /* whose descriptor it holds */
mtype view = DEGRADED;
byte view_epoch = NONE, view_pool = NONE;
bool view_quiet = true;
mtype core = DEGRADED;
byte core_epoch = NONE, core_pool = NONE;
bool unquiet[EPOCHS]; /* an old attachment that has not ended */

mtype = { OPENED, REFUSED };
mtype answer[EPOCHS];
chan open[SERVICES] = [3] of { byte, byte }; /* epoch, the pool handed over or NONE */

#define RUNS(i) (service[i] == LIVE)
#define QUIET(e) (!services_end[e])
#define OLD(e) (unquiet[e] && !QUIET(e))
#define ALL_QUIET (!OLD(1) && !OLD(2) && !OLD(3) && !OLD(4) && !OLD(5))
#define REACHABLE(i, e) (RUNS(i) && session[i * IDS + id_of[e]] == e && !told_to_stop[e])

/* Either the engine has left this pool for good, or its blocks still mean the same, and this is the one worker that
 * writes there. */
inline append(e) {
  assert(!alive || pool_of[e] != core_pool || !stale[e]);
  assert(!alive || pool_of[e] != core_pool || core == LOST || e == core_epoch)
}

proctype Worker(byte e) {
  do
  :: RUNS(home[e]) && (revoked[e] || told_to_stop[e]) -> break
  :: RUNS(home[e]) && !revoked[e] && !told_to_stop[e] && published[e] ->
    worker[e] = WRITING; /* from here to the end of the layer it looks at nothing */
    if
    :: d_step { RUNS(home[e]) -> append(e); worker[e] = IDLE; published[e] = false; stale[e] = false }
    :: service[home[e]] == DEAD -> goto over
    fi
  :: service[home[e]] == DEAD -> break
  od;
over:
  skip;
  d_step { worker[e] = ENDED; published[e] = false; stale[e] = false }
}

#define HAS_ENDED(e) (worker[e] == 0 || worker[e] == ENDED)

inline stop_epoch(i, k) {
  told_to_stop[session[k]] = true;
  if
  :: RUNS(i) && HAS_ENDED(session[k]) -> services_end[session[k]] = false /* the worker, then the tether */
  :: service[i] == DEAD -> goto dead
  fi
}

/* Its engine has let go, the engine is dead or has gone on without it, or (a fault) its lease ends too early. */
#define UNWANTED(k) (session[k] != NONE && \
  (services_end[session[k]] && !engines_end[session[k]] || !alive || session[k] != epoch))

inline end_session(i) {
  stop_epoch(i, k);
  session[k] = NONE; k = 0
}

#define NOBODY_IN(i, e) (home[e] != i || HAS_ENDED(e))

proctype Service(byte i) {
  byte e, given, k;
end_serve:
  do
  :: service[i] == DEAD -> goto dead
  :: RUNS(i) && nempty(open[i]) ->
    atomic { open[i]?e, given; k = i * IDS + id_of[e] }
    if
    :: session[k] != NONE && (e <= session[k] || given == NONE) -> answer[e] = REFUSED /* STALE_EPOCH, SESSION_EXISTS */
    :: session[k] != NONE && e > session[k] && given != NONE ->
      pool_of[e] = pool_of[session[k]];
      stop_epoch(i, k);
      atomic { session[k] = e; answer[e] = OPENED }
    :: atomic { session[k] == NONE && given != NONE -> pool_of[e] = given; session[k] = e; answer[e] = OPENED }
    :: atomic { session[k] == NONE && given == NONE ->
        pool_of[e] = pools; pools++; session[k] = e; answer[e] = OPENED }
    fi;
    e = 0; given = 0; k = 0
  :: atomic { RUNS(i) && UNWANTED(i * IDS) -> k = i * IDS }; end_session(i)
  :: atomic { RUNS(i) && session[i * IDS] != NONE && !UNWANTED(i * IDS) && faults > 0 -> faults--; k = i * IDS }; end_session(i)
  :: atomic { RUNS(i) && UNWANTED(i * IDS + 1) -> k = i * IDS + 1 }; end_session(i)
  :: atomic { RUNS(i) && session[i * IDS + 1] != NONE && !UNWANTED(i * IDS + 1) && faults > 0 -> faults--; k = i * IDS + 1 }; end_session(i)
  :: atomic { RUNS(i) && UNWANTED(i * IDS + 2) -> k = i * IDS + 2 }; end_session(i)
  :: atomic { RUNS(i) && session[i * IDS + 2] != NONE && !UNWANTED(i * IDS + 2) && faults > 0 -> faults--; k = i * IDS + 2 }; end_session(i)
  od;
dead:
  /* The kernel has taken the memory away in every thread before it closes the sockets. */
  NOBODY_IN(i, 1) && NOBODY_IN(i, 2) && NOBODY_IN(i, 3) && NOBODY_IN(i, 4) && NOBODY_IN(i, 5);
  d_step {
    for (e : 1 .. EPOCHS - 1) {
      if
      :: home[e] == i && e <= epoch -> services_end[e] = false; answer[e] = (answer[e] == OPENED -> OPENED : REFUSED)
      :: else
      fi
    }
    for (k : i * IDS .. i * IDS + IDS - 1) { session[k] = NONE }
    k = 0;
    do
    :: nempty(open[i]) -> open[i]?e, given
    :: empty(open[i]) -> break
    od;
    e = 0; given = 0;
    service[i] = ABSENT
  }
}

/* The keeper's attempt at an epoch; `ok` if the data plane is on and nobody old is left. */
inline connect(i) {
  ok = false;
  atomic { epoch++; tried = epoch; home[tried] = i; id_of[tried] = id; open[i]!tried, pool }
  if
  :: answer[tried] == OPENED ->
    if
    :: atomic { REACHABLE(i, tried) -> services_end[tried] = true; engines_end[tried] = true } /* fetched */
      if
      :: atomic { REACHABLE(i, tried) -> worker[tried] = IDLE; run Worker(tried); pool = pool_of[tried]; ok = true }
      :: !REACHABLE(i, tried)
      fi
    :: !REACHABLE(i, tried)
    fi
  :: answer[tried] == REFUSED
  :: !RUNS(i)
  fi
}

#define DESCRIBE(new_view, e, is_quiet) \
  view = new_view; view_epoch = e; view_pool = pool; view_quiet = is_quiet

inline release_old() {
  for (e : 1 .. EPOCHS - 1) {
    if
    :: unquiet[e] -> unquiet[e] = false; engines_end[e] = false
    :: else
    fi
  }
  e = 0
}

inline lose() {
  d_step {
    if
    :: pool != NONE && id < IDS - 1 -> pool = NONE; id++; release_old(); DESCRIBE(LOST, NONE, false)
    :: else
    fi
  }
}

proctype Keeper() {
  byte i, tried, e;
  bool ok;
  {
    do
    :: epoch == LAST -> tired = true; break
    :: epoch < LAST ->
      if
      :: RUNS(0) -> i = 0
      :: RUNS(1) -> i = 1
      fi;
      connect(i);
      if
      :: ok ->
        if
        :: ALL_QUIET -> /* await_quiet */
          d_step { release_old(); DESCRIBE(UP, tried, false) }
          if
          :: !RUNS(i) /* silence */
          :: QUIET(tried)
          :: revoked[tried] /* the core gave it up */
          :: atomic { faults > 0 -> faults-- } /* the link breaks */
          fi;
          revoked[tried] = true; /* interrupt */
          d_step { unquiet[tried] = true; DESCRIBE(DEGRADED, tried, QUIET(tried)) }
        :: !REACHABLE(i, tried) -> engines_end[tried] = false
        :: !ALL_QUIET -> engines_end[tried] = false; lose() /* the old worker did not stop within the lease */
        fi
      :: else -> engines_end[tried] = false
      fi;
      if
      :: atomic { view == DEGRADED && view_epoch != NONE && !view_quiet && QUIET(view_epoch) -> view_quiet = true }
      :: atomic { pool != NONE && faults > 0 -> faults--; lose() } /* the lease is over */
      :: true
      fi
    od
  } unless { !alive }
}

inline reassign() {
  for (used : 1 .. EPOCHS - 1) {
    stale[used] = stale[used] || published[used] && pool_of[used] == core_pool
  }
  used = 0
}

/* One iteration after the other. */
proctype Core() {
  {
    do
    :: tired -> break
    :: atomic { core != view || core_epoch != view_epoch -> /* poll */
        if
        :: core != LOST && core_pool != NONE && view_pool != core_pool -> core = LOST; core_pool = NONE /* lost */
        :: else ->
          assert(core == LOST || core_pool == NONE || view_pool == core_pool);
          core = view; core_epoch = view_epoch;
          if
          :: view == UP -> core_pool = view_pool
          :: else
          fi
        fi
      }
    :: d_step { core == UP && !published[core_epoch] -> reassign() } /* up */
    :: d_step { core == DEGRADED && view == DEGRADED && core_epoch == view_epoch && view_quiet && core_pool != NONE ->
        reassign() } /* degraded */
    :: core == UP && !revoked[core_epoch] ->
      published[core_epoch] = true;
      if
      :: !published[core_epoch] && worker[core_epoch] == IDLE /* done */
      :: atomic { revoked[core_epoch] || RUNS(home[core_epoch]) && worker[core_epoch] == ENDED ->
          core = DEGRADED; revoked[core_epoch] = true } /* aborted, or the worker has stopped */
      :: atomic { faults > 0 -> faults--; core = DEGRADED; revoked[core_epoch] = true }
      fi
    od
  } unless { !alive }
}

/* Stopped, continued, killed, started again; a second one while the first stands still. */
proctype Faults() {
end_faults:
  do
  :: atomic { faults > 0 && service[0] == LIVE -> faults--; service[0] = STILL }
  :: atomic { faults > 0 && service[0] == LIVE -> faults--; service[0] = DEAD }
  :: atomic { faults > 0 && service[0] == STILL && service[1] == ABSENT -> faults--; service[1] = LIVE; run Service(1) }
  :: d_step { faults > 0 && alive ->
      faults--; alive = false;
      for (dead_engine : 1 .. EPOCHS - 1) { engines_end[dead_engine] = false }
      dead_engine = 0
    }
  :: atomic { service[0] == STILL -> service[0] = LIVE }
  :: atomic { service[0] == STILL -> service[0] = DEAD }
  :: atomic { service[0] == ABSENT -> service[0] = LIVE; run Service(0) }
  od
}

/* When nothing more happens. */
proctype End() {
end:
  timeout ->
  assert(tired || !alive || core == UP && view == UP);
  assert(alive || (session[0] == NONE && session[1] == NONE && session[IDS] == NONE && session[IDS + 1] == NONE))
}

init {
  atomic {
    service[0] = LIVE; service[1] = ABSENT;
    run Service(0); run Keeper(); run Core(); run Faults(); run End()
  }
}
