"""What Redis runs for the registry: each script is one atomic step.

Keys, all behind one prefix in braces, so that a cluster keeps them together (``{prefix}:name``):

- ``variants``: hash, name -> JSON ``{number, canary, share}``
- ``versions:<name>``: hash, number -> JSON ``{created, digest, receipt}``
- ``numbers:<name>``: hash, digest -> number
- ``generation``: counts changes, since ``epoch``, a random word that is new in an emptied database
- ``changed``: the channel that tells of each change
"""

_NAMES = """
local prefix = KEYS[1]
local variants = prefix .. ':variants'
local function versions(name) return prefix .. ':versions:' .. name end
local function numbers(name) return prefix .. ':numbers:' .. name end
local function changed(name)
  redis.call('INCR', prefix .. ':generation')
  redis.call('PUBLISH', prefix .. ':changed', name)
end
"""

REGISTER = f"""{_NAMES}
local name, digest, created, receipt = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local number = redis.call('HGET', numbers(name), digest)
if not number then
  number = redis.call('HLEN', numbers(name)) + 1
  redis.call('HSET', numbers(name), digest, number)
  redis.call('HSET', versions(name), number, cjson.encode({{created=created, digest=digest, receipt=receipt}}))
end
redis.call('HSET', variants, name, cjson.encode({{number=tonumber(number), share='0'}}))
changed(name)
return {{tostring(number), redis.call('HGET', versions(name), number)}}
"""
"""Arguments: name, digest, created, receipt. Returns the version's number and record."""

POINT = f"""{_NAMES}
local name, digest, canary, share = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if redis.call('HEXISTS', variants, name) == 0 then return 'variant' end
local number = redis.call('HGET', numbers(name), digest)
if not number then return 'version' end
local other = nil
if canary ~= '' then
  other = redis.call('HGET', numbers(name), canary)
  if not other then return 'canary' end
end
redis.call('HSET', variants, name, cjson.encode({{number=tonumber(number), canary=tonumber(other), share=share}}))
changed(name)
return 'done'
"""
"""Arguments: name, digest, the canary's digest or nothing, share. Returns ``done`` or what is missing."""

REMOVE = f"""{_NAMES}
if redis.call('HDEL', variants, ARGV[1]) == 0 then return 0 end
redis.call('DEL', versions(ARGV[1]), numbers(ARGV[1]))
changed(ARGV[1])
return 1
"""
"""Argument: name. Returns whether it was there."""

SNAPSHOT = f"""{_NAMES}
redis.call('SET', prefix .. ':epoch', ARGV[1], 'NX')
local found = {{}}
local all = redis.call('HGETALL', variants)
for i = 1, #all, 2 do
  local pointer = cjson.decode(all[i + 1])
  local canary = pointer.canary and redis.call('HGET', versions(all[i]), pointer.canary) or ''
  table.insert(found, {{all[i], all[i + 1], redis.call('HGET', versions(all[i]), pointer.number), canary}})
end
return {{redis.call('GET', prefix .. ':epoch'), redis.call('GET', prefix .. ':generation'), found}}
"""
"""Argument: an epoch, for a database without one. Returns epoch, generation (nil at first), and of every variant
name, pointer, and the records of its current version and its canary."""

VERSIONS = f"""{_NAMES}
if redis.call('HEXISTS', variants, ARGV[1]) == 0 then return {{}} end
return redis.call('HGETALL', versions(ARGV[1]))
"""
"""Argument: name. Returns numbers and records in turn; nothing if there is no such variant."""

DIGESTS = f"""{_NAMES}
local found = {{}}
for _, name in ipairs(redis.call('HKEYS', variants)) do
  for _, digest in ipairs(redis.call('HKEYS', numbers(name))) do table.insert(found, digest) end
end
return found
"""
"""Returns the digests of all versions."""
