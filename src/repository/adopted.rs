//! Who may archive under a cluster's name, where several systems have: the one that was adopted last (I6).

use futures_util::future::try_join_all;
use serde::{Deserialize, Serialize};

use super::objects::{ObjectProblem, SMALL_OBJECT_BYTES_MAX, parse_json, to_json};
use super::{Archive, FORMAT, Lease, Repository, RepositoryError, Written};
use crate::storage::{Body, PutOutcome};
use crate::wal::{PgTime, SystemIdentifier};

/// `adopted.json`: this system archives under the name from here on. Created once, never changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopted {
    pub format: u32,
    pub system_identifier: SystemIdentifier,
    /// One more than that of every system before it. A system without the object has 0. The highest one archives; times decide
    /// nothing (I14).
    pub generation: u64,
    /// The systems that had archived under the name, for people.
    pub before: Vec<SystemIdentifier>,
    /// When, by the clock of the host where it was done, for people.
    pub adopted: PgTime,
    pub host: String,
}

impl Adopted {
    pub fn to_json(&self) -> Vec<u8> {
        to_json(self)
    }

    pub fn parse(bytes: &[u8]) -> Result<Self, ObjectProblem> {
        let adopted: Self = parse_json(bytes)?;
        if adopted.generation == 0 || adopted.host.len() > 1024 {
            return Err(ObjectProblem::Unreadable(
                "it has no generation, or its host is not named as hosts are".into(),
            ));
        }
        Ok(adopted)
    }
}

/// The systems under a cluster's name, each with its generation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Succession(Vec<(SystemIdentifier, u64)>);

impl Succession {
    /// Who keeps `system` from archiving under the name; `None`: it may.
    pub fn kept_by(&self, system: SystemIdentifier) -> Option<SystemIdentifier> {
        let own = self.generation_of(system);
        let others = self.0.iter().filter(|(other, _)| *other != system);
        // Two that were adopted at the same time: neither, until one of them is adopted again under a name of its own.
        others
            .filter(|(_, generation)| *generation >= own)
            .max_by_key(|(_, generation)| *generation)
            .map(|(other, _)| *other)
    }

    pub fn generation_of(&self, system: SystemIdentifier) -> u64 {
        self.0.iter().find(|(known, _)| *known == system).map_or(0, |(_, generation)| *generation)
    }

    pub fn others(&self, system: SystemIdentifier) -> Vec<SystemIdentifier> {
        self.0.iter().map(|(other, _)| *other).filter(|other| *other != system).collect()
    }

    pub fn next_generation(&self) -> u64 {
        self.0.iter().map(|(_, generation)| *generation).max().unwrap_or(0) + 1
    }
}

impl Repository {
    /// Every system under the name. Only where there are several is more than one listing asked for.
    pub async fn succession(&self) -> Result<Succession, RepositoryError> {
        let systems = self.systems().await?;
        if systems.len() < 2 {
            return Ok(Succession(systems.into_iter().map(|system| (system, 0)).collect()));
        }
        let asked = systems.into_iter().map(|system| async move {
            let adopted = self.bind(system).adopted().await?;
            Ok::<_, RepositoryError>((system, adopted.map_or(0, |adopted| adopted.generation)))
        });
        Ok(Succession(try_join_all(asked).await?))
    }
}

impl Archive {
    /// `None`: this system was never adopted, as the first one under a name.
    pub async fn adopted(&self) -> Result<Option<Adopted>, RepositoryError> {
        let key = self.keys().adopted();
        let Some(bytes) = self.get_if_there(&key, SMALL_OBJECT_BYTES_MAX).await? else { return Ok(None) };
        let adopted = Adopted::parse(&bytes).map_err(|problem| problem.at(&self.url(), &key))?;
        self.check_system(&key, adopted.system_identifier)?;
        Ok(Some(adopted))
    }

    /// Makes this system the one that archives under the name. Holding its lease keeps two from doing it at once; one that was
    /// adopted before stays as it was.
    pub async fn adopt(&self, lease: &Lease, succession: &Succession, host: &str) -> Result<Written, RepositoryError> {
        lease.require()?;
        let key = self.keys().adopted();
        let adopted = Adopted {
            format: FORMAT,
            system_identifier: self.system(),
            generation: succession.next_generation(),
            before: succession.others(self.system()),
            adopted: PgTime::from_timestamp(jiff::Timestamp::now()),
            host: host.chars().take(200).collect(),
        };
        let json = adopted.to_json();
        let crc32 = crc32fast::hash(&json);
        match self.store().put_new(&key, &Body::Bytes(json.into()), crc32).await? {
            PutOutcome::Created => Ok(Written::Created),
            PutOutcome::Exists => Ok(Written::AlreadyThere),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn succession(systems: &[(u64, u64)]) -> Succession {
        Succession(systems.iter().map(|(system, generation)| (SystemIdentifier::new(*system), *generation)).collect())
    }

    #[test]
    fn the_one_adopted_last_archives_and_nobody_else() {
        let kept = |systems: &[(u64, u64)], system: u64| {
            succession(systems).kept_by(SystemIdentifier::new(system)).map(|by| by.to_string())
        };
        assert_eq!(kept(&[], 7), None);
        assert_eq!(kept(&[(7, 0)], 7), None);
        assert_eq!(kept(&[(7, 0)], 8).as_deref(), Some("7"));
        assert_eq!(kept(&[(7, 0), (8, 1)], 8), None);
        assert_eq!(kept(&[(7, 0), (8, 1)], 7).as_deref(), Some("8"), "the old one does not come back unnoticed");
        assert_eq!(kept(&[(7, 0), (8, 1)], 9).as_deref(), Some("8"));
        assert_eq!(kept(&[(7, 2), (8, 1)], 7), None, "adopted again");
        assert_eq!(kept(&[(7, 0), (8, 0)], 8).as_deref(), Some("7"));
        assert_eq!(succession(&[(7, 0), (8, 4)]).next_generation(), 5);
    }

    #[test]
    fn an_adoption_without_a_generation_is_none() {
        let adopted = Adopted {
            format: 1,
            system_identifier: SystemIdentifier::new(8),
            generation: 1,
            before: vec![SystemIdentifier::new(7)],
            adopted: PgTime::from_pg_micros(0),
            host: "db1".into(),
        };
        assert_eq!(Adopted::parse(&adopted.to_json()), Ok(adopted.clone()));
        assert!(Adopted::parse(&Adopted { generation: 0, ..adopted }.to_json()).is_err());
    }
}
