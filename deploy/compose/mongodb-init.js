// Makes the replica set and midge's user, or finds them there. Run by `mongodb-init` in docker-compose.yml.
const fs = require('fs')
const secret = (name) => fs.readFileSync(`/run/secrets/${name}`, 'utf8').trim()

const connection = new Mongo(
  `mongodb://root:${encodeURIComponent(secret('mongodb_root_password'))}@mongodb/admin?directConnection=true`
)
const admin = connection.getDB('admin')

try {
  admin.adminCommand({ replSetGetStatus: 1 })
} catch (error) {
  if (error.codeName !== 'NotYetInitialized') throw error
  admin.adminCommand({
    replSetInitiate: {
      _id: 'rs0',
      members: [{ _id: 0, host: 'mongodb:27017' }],
      settings: { electionTimeoutMillis: 3000 }
    }
  })
}
while (!admin.hello().isWritablePrimary) sleep(200)

const midge = connection.getDB('midge')
const account = { pwd: secret('mongodb_password'), roles: [{ role: 'readWrite', db: 'midge' }] }
if (midge.getUser('midge')) midge.updateUser('midge', account)
else midge.createUser({ user: 'midge', ...account })
